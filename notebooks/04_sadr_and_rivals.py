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
# # SADR and its rivals
#
# SADR adds a term to an edit's objective: for heads that attend to the subject more than any head of
# their layer did before, the KL divergence between the original attention row and the present one,
# times gamma. This notebook looks at what gamma trades against what, at other rules for choosing
# heads, and at other things that could be restricted, always with the same number of steps at most.

# %%
import tempfile

import driftlens as dl
from driftlens import figures
from driftlens.assets import asset
from driftlens.bench import UNEDITED, Arm, Setting, make_arms, run_bench
from driftlens.cases import METRICS, balanced
from driftlens.readers import read_cases

model = dl.load_model("smollm2-135m")

# %% [markdown]
# ## Inside one edit
#
# The trace shows the penalty at work: it is zero before the first step, rises with the drift, and
# the number of heads that are held changes from step to step.

# %%
request = dl.EditRequest("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris")
cured = dl.edit(model, request, method="rome", penalty=dl.SADR(gamma=0.8))
cured.plot()

# %% [markdown]
# Attention before, after, and after with SADR, on a prompt that was not part of the objective:

# %%
prompt = (
    "The Eiffel Tower is located in the city of Rome. "
    "The cathedral of Notre-Dame is located in the city of"
)
edit = dl.edit(model, request, method="rome")
drift = dl.measure_drift(model, edit, prompt)
drift.plot(cured=dl.measure_drift(model, cured, prompt))

# %% [markdown]
# ## Trade-offs over some cases
#
# Arms are editors with restrictions. Penalties are objects; several in one arm add up. Three cases
# are far too few for conclusions, and the intervals say so: `driftlens reproduce fig6 fig7 rules
# rivals --out my-results` does the same with 150.

# %%
cases = balanced(read_cases(asset("facts.jsonl")), 3)
rome = make_arms(model, ["rome"], ["none"])[1]
penalties = {
    "gamma 0.2": (dl.SADR(gamma=0.2),),
    "gamma 0.8": (dl.SADR(gamma=0.8),),
    "gamma 3.2": (dl.SADR(gamma=3.2),),
    "all heads, gamma 0.8": (dl.SADR(gamma=0.8, heads="all"),),
    "keys 0.01": (dl.KeyDrift(weight=0.01),),
    "hidden state 0.3": (dl.HiddenDrift(weight=0.3, relative=True),),
    "SADR and keys": (dl.SADR(gamma=0.8), dl.KeyDrift(weight=0.01)),
}
arms = [Arm(UNEDITED), rome, *(Arm(k, "rome", rome.config, p) for k, p in penalties.items())]
result = run_bench(model, cases, arms, tempfile.mkdtemp(), setting=Setting(METRICS))
result.table().pivot_table(index="arm", columns="metric", values="value", sort=False)

# %%
figures.trade_off(result.trade_off(), title="What edits keep, on three cases")

# %% [markdown]
# Success counts only which answer is likelier. Probabilities move long before:

# %%
figures.rate_bars(
    result.table("prob"), METRICS, title="Mean probability of the right answer",
    unit="probability", top=1.0,
)

# %% [markdown]
# Compared pair by pair, on the same cases: SADR less none.

# %%
for metric, difference in result.compare("gamma 0.8", "rome", "prob").items():
    print(f"{metric:4} {difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]")

# %% [markdown]
# ## A penalty of your own
#
# Name the hooks it looks at, and turn what they give now and gave before into a loss. This one holds
# what attention writes above the edit, at the last prompt token.

# %%
from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True)
class OutputDrift(dl.Penalty):
    """Squared drift of what attention writes above the edit, in units of its original norm."""

    kind: ClassVar[str] = "output_drift"
    weight: float = 0.1

    def activations(self, sites):
        return [f"blocks.{layer}.hook_attn_out" for layer in sites.layers]

    def __call__(self, now, original, sites):
        drifts = []
        for name in self.activations(sites):
            new, old = sites.at_last_prompt(now[name]), sites.at_last_prompt(original[name])
            drifts.append(((new - old) ** 2).sum(-1) / (old**2).sum(-1))
        return dl.PenaltyTerm(self.weight * torch.stack(drifts).mean(), {})


own = dl.edit(model, request, method="rome", penalty=OutputDrift(), progress=False)
own.plot()
