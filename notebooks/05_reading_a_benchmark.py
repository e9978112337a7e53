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
# # Reading a benchmark run
#
# `driftlens bench` edits many cases with many editors, asks what should have changed and what should
# not, and keeps every finished unit at once. This notebook makes a small run and reads it in every
# way there is.
#
#     driftlens bench --methods rome,memit --penalties none,sadr --cases 200 --out my-bench

# %%
import json
import tempfile
from pathlib import Path

import pandas as pd

import driftlens as dl
from driftlens import figures
from driftlens.assets import asset
from driftlens.bench import BenchResult, make_arms, run_bench
from driftlens.cases import ALL_METRICS, balanced
from driftlens.readers import read_cases

model = dl.load_model("smollm2-135m")
cases = balanced(read_cases(asset("facts.jsonl")), 6)
folder = Path(tempfile.mkdtemp())
run_bench(model, cases, make_arms(model, ["rome", "memit"]), folder)

# %% [markdown]
# ## What was asked
#
# A case is an edit and its prompts. Each prompt has a right and, mostly, a wrong answer, and counts
# for one metric.

# %%
pd.DataFrame([case.summary() for case in cases])[["id", "category", "subject", "target_new"]]

# %%
pd.Series(ALL_METRICS, name="metric").to_frame()

# %% [markdown]
# ## The main table
#
# A folder is read back by `BenchResult`, while it is still being written or later. Success by
# comparison, pooled over prompts; intervals are a bootstrap over cases, because prompts of one case
# belong together.

# %%
result = BenchResult(folder)
print(result.to_markdown())

# %%
rows = result.table()
figures.rate_bars(rows, ["ES", "PS", "NS", "RS", "DNS", "Avg. S"], title="Success, six cases")

# %% [markdown]
# By case instead of by prompt (`by="case"`), and as magnitudes: `"prob"`, `"margin"` (nats per token),
# `"exact"` (greedy decoding).

# %%
figures.rate_bars(
    result.table("prob", by="case"), ["ES", "PS", "NS", "RS", "DNS"],
    title="Mean probability of the right answer", unit="probability", top=1.0,
)

# %% [markdown]
# ## Paired comparisons
#
# Two arms on the same cases: the difference, its interval, the effect size, and in how many cases it
# went up or down.

# %%
pd.DataFrame(
    [
        {"metric": metric, **vars(found)}
        for metric, found in result.compare("rome + sadr", "rome", "prob").items()
    ]
).round(3)

# %% [markdown]
# ## The controls
#
# A fall behind the edited sentence is not all the edit's doing: a sentence in front changes answers on
# the unedited model, too. `DNS` of the unedited arm has the edited sentence in front,
# `lead-neighbour` an unrelated one.

# %%
unedited = result.rates("unedited", "prob")
pd.Series({name: unedited[name].value for name in ("NS", "DNS", "lead-neighbour") if name in unedited})

# %% [markdown]
# ## Prompt by prompt

# %%
frame = result.to_dataframe()
wide = frame.pivot_table(
    index=["metric", "prompt", "right_text"], columns="arm", values="right_prob", sort=False
)
worst = wide.assign(lost=wide["unedited"] - wide["rome"]).sort_values("lost", ascending=False)
worst.head(8).round(3)

# %%
by_category = frame[frame["metric"].isin(["NS", "RS", "DNS"])].pivot_table(
    index="category", columns="arm", values="right_prob", sort=False
)
by_category.round(3)

# %% [markdown]
# ## What edits keep

# %%
figures.trade_off(result.trade_off(), title="Edit against other knowledge, six cases")

# %% [markdown]
# ## One page for others
#
# `driftlens report my-bench -o report.html` writes tables, charts and the most telling prompts, with
# their attention to click through, as one file.

# %%
from driftlens.report import look_into, report, telling_prompts

prompts = telling_prompts(result, 1)
page = folder / "report.html"
page.write_text(report(result, [(p, look_into(model, result, p)) for p in prompts]), "utf-8")
print(f"{page.stat().st_size / 1e6:.1f} MB")

# %% [markdown]
# ## Six cases are six cases
#
# The table that comes with DriftLens has 60, of other data (CounterFact and WikiData, as the paper
# merges them, whose answers this model hardly knows), so that its numbers are not to be compared with
# those above. None of the 60 was used to choose hyperparameters.

# %%
shipped = json.loads(asset("results/editors-smollm2-135m.json").read_text(encoding="utf-8"))
table = pd.DataFrame(shipped["table"])
table.pivot_table(index="arm", columns="metric", values="value", sort=False).round(1)
