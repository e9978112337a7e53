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
# # The paper in ten minutes
#
# One edit: its drift, the proof, and the cure (*Revealing and Mitigating Over-Attention in Knowledge
# Editing*, ICLR 2025). We change one fact in a real language model, look at which attention heads drift to the edited
# subject, show by causal patching that this is what breaks another fact, and repeat the edit with
# SADR, which restricts the drift.
#
# The model is SmolLM2-135M (four-bit weights, dequantised to float32). It is fetched at first use.

# %%
import driftlens as dl

model = dl.load_model("smollm2-135m")
model

# %% [markdown]
# ## The edit
#
# ROME writes one rank-one update into one MLP matrix, so that the model places the Eiffel Tower in
# Rome. The model itself stays as it is: an edit is a delta that is switched on for a `with` block.

# %%
request = dl.EditRequest(
    prompt="{} is located in the city of",
    subject="The Eiffel Tower",
    target_new="Rome",
    target_true="Paris",
)
edit = dl.edit(model, request, method="rome")
print("before", dl.score(model, request.text, ["Paris", "Rome"]))
with edit.applied(model):
    print("after ", dl.score(model, request.text, ["Paris", "Rome"]))

# %%
edit.plot()

# %% [markdown]
# ## What else it changed
#
# Nothing was said about Notre-Dame. The sentence in front of the question is the edited one. The
# unedited model is not misled by it, so what happens below is the edit's doing and not the
# context's.

# %%
prompt = (
    "The Eiffel Tower is located in the city of Rome. "
    "The cathedral of Notre-Dame is located in the city of"
)
experiment = dl.PatchExperiment(model, edit, prompt, subject="The Eiffel Tower", answer="Paris")
print("original", experiment.original)
print("edited  ", experiment.edited)

# %% [markdown]
# ## The drift
#
# Attention from the last token of the prompt to the subject's last token, for every head. Only an
# MLP was changed, and yet heads above it look at the subject far more.

# %%
drift = dl.measure_drift(model, edit, prompt, subject="The Eiffel Tower")
drift.plot()

# %%
drift.to_dataframe().sort_values("difference", ascending=False).head(8)

# %% [markdown]
# ## The proof
#
# We run the *edited* model and put the *original* model's attention rows of the last token back,
# all at once. Nothing else is changed: the values that the rows read stay the edited model's.

# %%
result = experiment.attention()
result.plot()

# %% [markdown]
# How much of the lost probability comes back, by what is restored? Restoring pattern *and* values
# in all layers gives the last token everything that it reads from other positions, so it must
# bring all but everything back (only the edited matrix's effect at the last token itself stays);
# it is the control of the method, not a finding.

# %%
import pandas as pd

rows = {
    "pattern": experiment.attention(),
    "pattern, all rows": experiment.attention(queries="all"),
    "pattern, column of the subject only": experiment.attention(columns="subject_last"),
    "values": experiment.attention(exchange="values"),
    "pattern and values": experiment.attention(exchange="both"),
    "MLP output": experiment.activation("mlp_out"),
}
pd.DataFrame(
    {
        name: {
            "P(Paris)": r.patched.prob,
            "P(Rome)": r.patched["Rome"].prob,
            "recovered share": r.recovered_share,
        }
        for name, r in rows.items()
    }
).T

# %% [markdown]
# Which heads? Each cell of the map is a run of its own, with one head restored.

# %%
sweep = experiment.sweep()
sweep.plot()

# %% [markdown]
# ## The cure
#
# SADR adds a penalty to the edit's objective: the KL divergence between the original and the
# current attention row, only for heads that attend to the subject more than any head of their
# layer did before. The number of optimisation steps is the same.

# %%
cured = dl.edit(model, request, method="rome", penalty=dl.SADR(gamma=0.8))
with cured.applied(model):
    print("the edit   ", dl.score_details(model, request.text, ["Rome"])["Rome"].prob)
    print("Notre-Dame ", dl.score_details(model, prompt, ["Paris"])["Paris"].prob)

# %%
drift.plot(cured=dl.measure_drift(model, cured, prompt, subject="The Eiffel Tower"))

# %% [markdown]
# ## All of it on one page
#
# Click a head to see its attention, token by token, in the original model, the edited one and the
# one edited with SADR. `save("page.html")` writes the same page as one file that needs no server.

# %%
dl.compare(model, edit, prompt, answer="Paris", cured=cured)

# %% [markdown]
# ## One example is one example
#
# This one was chosen because it shows the effect plainly. Here is the paper's main table on this
# model, as it comes with DriftLens: 60 cases of the paper's data (CounterFact and WikiData) that no
# search for hyperparameters saw. ES: the edit;
# PS: its paraphrases; NS: other subjects; RS: other facts about the subject; DNS: other subjects
# behind the edited sentence. The command that made it is in the file.

# %%
import json

from driftlens import figures
from driftlens.assets import asset

shipped = json.loads(asset("results/editors-smollm2-135m.json").read_text(encoding="utf-8"))
table = pd.DataFrame(shipped["table"])
arms = ["unedited", *(arm + held for arm in ("rome", "memit", "pmet") for held in ("", " + sadr"))]
of_paper = table[table["arm"].isin(arms)]
figures.rate_bars(of_paper, ["ES", "PS", "NS", "RS", "DNS"], title="Success with 95 % intervals")

# %%
print(shipped["command"])
