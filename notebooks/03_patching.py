# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Causal patching in depth
#
# Attention drifts after an edit; other knowledge breaks. Does the one cause the other? Patching
# answers: run one of the two models, original and edited, with something of the other's put in, and
# read the answer. This notebook goes through what can be exchanged, in which direction, and what
# each result does and does not show.

# %%
import numpy as np
import pandas as pd
import plotly.express as px

import driftlens as dl

model = dl.load_model("smollm2-135m")
request = dl.EditRequest("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris")
edit = dl.edit(model, request, method="rome")
prompt = (
    "The Eiffel Tower is located in the city of Rome. "
    "The cathedral of Notre-Dame is located in the city of"
)
restore = dl.PatchExperiment(model, edit, prompt, answer="Paris")
pd.DataFrame(
    {"original": restore.original.prob, "edited": restore.edited.prob}, index=["P(Paris)"]
)

# %% [markdown]
# ## What can be exchanged
#
# A head at the last token writes a sum of *values* that it reads from other positions, weighted by
# its attention *pattern*. Drift is a change of the pattern. The edit also changes what stands at the
# subject, so that unmoved attention would read something new: that is a change of the values.
#
# - `exchange="pattern"`: the other model's rows; values stay the running model's own.
# - `exchange="values"`: the values that these rows read; rows stay.
# - `exchange="both"`: both, so that a head writes what it wrote in the other model.
# - `activation("mlp_out")`, `"attn_out"`: what whole layers write; `"resid"`: the stream itself.

# %%
results = {
    "pattern": restore.attention(),
    "values": restore.attention(exchange="values"),
    "both": restore.attention(exchange="both"),
    "MLP output": restore.activation("mlp_out"),
    "attention output": restore.activation("attn_out"),
}
pd.DataFrame(
    {name: {"P(Paris)": r.patched.prob, "recovered share": r.recovered_share}
     for name, r in results.items()}
).T

# %% [markdown]
# The *recovered share* is the part of the lost probability that is back: 0 is the edited model, 1 the
# original. It is not defined where nothing was lost (`nan`), and single shares need not add up to 1:
# what one exchange repairs, another may repair as well.
#
# "Both" at all layers is a control: with everything that the last token reads from elsewhere put
# back, nearly everything must come back. If it does not, either the edit acts at the last token
# itself (a prompt that ends with the subject), or the harness is wrong.
#
# ## Restore and contaminate
#
# Restoring asks whether the drift is *needed* for the damage. Contaminating asks whether it is
# *enough*: the original model, its weights untouched, with the edited model's attention.

# %%
contaminate = dl.PatchExperiment(model, edit, prompt, answer="Paris", direction="contaminate")
pairs = {
    (direction, exchange): experiment.attention(exchange=exchange)
    for direction, experiment in (("restore", restore), ("contaminate", contaminate))
    for exchange in ("pattern", "values", "both")
}
by_direction = pd.DataFrame(
    [{"direction": d, "exchanged": e, "P(Paris)": r.patched.prob} for (d, e), r in pairs.items()]
)
px.bar(
    by_direction, x="exchanged", y="P(Paris)", color="direction", barmode="group",
    range_y=[0, 1], template="plotly_white",
    title=f"Original {restore.original.prob:.2f}, edited {restore.edited.prob:.2f}",
)

# %% [markdown]
# ## Which rows, which columns
#
# By default only the rows of the last token are exchanged, where the answer is predicted. Rows of
# earlier tokens matter too, if what they read is passed on. And of a row, only the column of the
# subject's last token may be restored; the rest is rescaled so that the row stays a distribution.

# %%
where = {
    "last row": restore.attention(),
    "all rows": restore.attention(queries="all"),
    "last row, column of the subject's last token": restore.attention(columns="subject_last"),
    "last row, columns of the subject": restore.attention(columns="subject"),
}
pd.DataFrame({name: {"P(Paris)": r.patched.prob} for name, r in where.items()}).T

# %% [markdown]
# ## Which layers: windows
#
# One layer alone may be too little, all layers tell nothing of where. A window slides over the
# layers; its width is yours to choose.

# %%
n = model.info.n_layers
rows = [
    {"first layer": first, "exchanged": exchange, "recovered share": restore.attention(
        layers=range(first, first + 6), exchange=exchange).recovered_share}
    for exchange in ("pattern", "values")
    for first in range(0, n - 5, 2)
]
px.line(
    pd.DataFrame(rows), x="first layer", y="recovered share", color="exchanged", markers=True,
    template="plotly_white", title="Windows of six layers restored",
)

# %% [markdown]
# ## Which heads
#
# A sweep restores every single head, every layer and every window: a run for each, of which only
# what the patch can change is computed.

# %%
sweep = restore.sweep()
sweep.plot()

# %% [markdown]
# Do the heads that drift most bring back most? If drift is the cause, large drift and large recovery
# should go together, head by head. On one prompt this is an impression; `driftlens reproduce fig4
# --out my-results` asks the related question over many: whether prompts with more drift lose more.

# %%
drift = dl.measure_drift(model, edit, prompt)
together = pd.DataFrame(
    {
        "drift": drift.difference[0].ravel(),
        "recovered share": sweep.head_shares().ravel(),
        "head": [f"L{y}H{h}" for y in range(n) for h in range(model.info.n_heads)],
    }
)
px.scatter(
    together, x="drift", y="recovered share", hover_name="head", template="plotly_white",
    title=f"Each point is a head; r = {np.corrcoef(together['drift'], together['recovered share'])[0, 1]:.2f}",
)

# %% [markdown]
# Several heads together: those that alone bring back most, restored at the same time.

# %%
names = [name for name, _ in sweep.top_heads(20)]
together = pd.DataFrame(
    [
        {"heads restored": k, "P(Paris)": restore.attention(heads=names[:k]).patched.prob}
        for k in (1, 2, 3, 5, 8, 12, 20)
    ]
)
px.line(
    together, x="heads restored", y="P(Paris)", markers=True, range_y=[0, 1],
    template="plotly_white",
)

# %% [markdown]
# ## What this shows, and what it does not
#
# - A patch that brings the answer back shows that what was exchanged *carries* the damage on this
#   prompt. It does not show that nothing else does.
# - A patch that brings nothing back may be too small: other heads can do the same.
# - Restoring a pattern into a model whose values have changed makes a state that neither model was
#   ever in. Contaminating the original model is the fairer test of "enough".
# - One prompt is one prompt. The averages over the shipped facts are in the README; on this model
#   values carry more of the damage than patterns.
