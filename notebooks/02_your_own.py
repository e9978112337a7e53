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
# # Your own edit, and your own model
#
# How to bring a model and a fact of your own, choose where to edit, and keep the result. Nothing
# here is special to the model that comes with DriftLens.

# %%
import tempfile
from pathlib import Path

import pandas as pd
import plotly.express as px

import driftlens as dl

# %% [markdown]
# ## A model of yours
#
# `dl.load_model` takes the name of a bundled model, a name on the Hugging Face hub, a folder with
# safetensors, a `.gguf` file, a Hugging Face model in memory with its tokenizer, or a
# `TransformerBridge`. Here we take a file, as you might have it on your disk.

# %%
from driftlens.bundled import fetch

file = fetch("smollm2-135m")  # any .gguf file of yours
model = dl.load_model(file, name="my-model")
folder = Path(tempfile.mkdtemp())
model.info

# %% [markdown]
# Loading has tried on every layer that interventions really act: an attention row that is replaced
# must change the output, and what is computed before it must not move. A model on which they would
# silently do nothing is refused.
#
# ## A fact of yours
#
# `{}` stands for the subject. What is true now is optional; it is only read, never
# optimised.

# %%
request = dl.EditRequest(
    prompt="The mother tongue of {} is",
    subject="Marie Curie",
    target_new="French",
    target_true="Polish",
)
asked = {
    "the edit": request.text,
    "a paraphrase": "Marie Curie grew up speaking",
    "another subject": "The mother tongue of Frederic Chopin is",
}
other_fact = ("Marie Curie worked in the field of", "physics")


def ask(title: str) -> dict[str, object]:
    """What the model says now."""
    row: dict[str, object] = {"": title}
    for name, prompt in asked.items():
        row[f"P(French), {name}"] = dl.score_details(model, prompt, ["French"])["French"].prob
    prompt, answer = other_fact
    row[f"P({answer}), another fact"] = dl.score_details(model, prompt, [answer])[answer].prob
    return row


pd.DataFrame([ask("unedited")])

# %% [markdown]
# ## Where to edit
#
# For models with published or tuned hyperparameters, `dl.edit(model, request, method="rome")` takes
# them (`driftlens methods --model NAME` lists them). For any other it takes a layer by depth and says
# so. Then look for yourself: some layers, and what each does to the edit and to what it should leave
# alone. ROME needs to know which keys a layer sees otherwise; this takes a while at first, for all
# layers together, and is kept. Less text than the default is enough to look around.

# %%
covariances = dl.key_covariances(model, [4, 5, 6, 10, 14], max_tokens=20_000)
rows = []
for layer in (4, 6, 10, 14):
    edit = dl.edit(
        model, request, method="rome", layer=layer, covariance=covariances, progress=False
    )
    with edit.applied(model):
        rows.append({"layer": layer, **ask(f"layer {layer}")})
by_layer = pd.DataFrame(rows).drop(columns="")
px.line(
    by_layer.melt("layer", var_name="asked", value_name="probability"),
    x="layer", y="probability", color="asked", markers=True, template="plotly_white",
)

# %% [markdown]
# One fact is not enough to choose by: `python -m driftlens.experiments.tuning` is such a search over
# many cases, and `driftlens bench` measures the result on others.
#
# ## The edit, kept
#
# An edit is a small file: the change of the weights, how it was made, and the trace of its
# optimisation. It belongs to this model, whose fingerprint it holds.

# %%
edit = dl.edit(model, request, method="rome", layer=6, covariance=covariances)
edit.save(folder / "marie-curie")
again = dl.load_edit(folder / "marie-curie")
again.plot()

# %%
with again.applied(model):
    after = ask("edited")
pd.DataFrame([ask("unedited again"), after])

# %% [markdown]
# ## An edit made elsewhere
#
# Any change of weights can be studied: `dl.Edit.from_deltas` takes matrices, and
# `dl.Edit.from_checkpoint` compares two folders of weights. Here we take the low-rank change of the
# edit above as if another tool had made it.

# %%
matrices = {name: delta.dense() for name, delta in edit.deltas.items()}
foreign = dl.Edit.from_deltas(model, matrices, method="elsewhere", request=request)
prompt = "The mother tongue of Marie Curie is French. The mother tongue of Frederic Chopin is"
drift = dl.measure_drift(model, foreign, prompt, subject="Marie Curie")
drift.plot()

# %% [markdown]
# ## Several facts
#
# At once, with an editor that spreads them over layers; or one after another, with any.

# %%
requests = [
    request,
    dl.EditRequest("The mother tongue of {} is", "Pablo Picasso", "Italian", "Spanish"),
    dl.EditRequest("{} is located in the city of", "The Brandenburg Gate", "Vienna", "Berlin"),
]
batch = dl.edit(
    model, requests, method="memit", layers=(4, 5, 6), cov_weight=100.0, covariance=covariances
)
row = dl.edit_sequence(model, requests, method="rome", layer=6, covariance=covariances)


def probabilities(edit: dl.Edit) -> list[float]:
    """Of each new target, with the edit on."""
    with edit.applied(model):
        return [
            dl.score_details(model, r.text, [r.target_new])[r.target_new].prob for r in requests
        ]


pd.DataFrame(
    {"memit, at once": probabilities(batch), "rome, one after another": probabilities(row)},
    index=[f"{r.text} {r.target_new}" for r in requests],
)

# %%
batch.plot()

# %% [markdown]
# ## When something does not fit
#
# Errors say what is wrong and what to do; nothing is left half applied.

# %%
try:
    dl.measure_drift(model, edit, "The mother tongue of Pablo Picasso is", subject="Marie Curie")
except dl.TokenError as error:
    print(error)
try:
    dl.edit(model, request, method="rome", layer=99)
except dl.DriftLensError as error:
    print(error)
