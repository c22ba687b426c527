# SPDX-License-Identifier: Apache-2.0

# %% [markdown]
# # Your own data
#
# Rows with several columns, from a pandas frame or a list of dicts, become inputs by a
# template. A split of Hugging Face's datasets goes the same way.

# %%
import pandas as pd

import prompt_tuning as pt

frame = pd.DataFrame(
    {
        "premise": ["it rains", "the sun shines", "it snows", "a dog sleeps"],
        "hypothesis": ["it is wet", "it is dark", "it is cold", "a cat runs"],
        "label": [1, 0, 1, 0],
    }
)
base = pt.load("embedded:t5_1_1_mini")

# %% [markdown]
# Value i of the label column stands for label i. The folder keeps checkpoints: the same
# cell, run again, goes on where it was stopped.

# %%
run = pt.tune(
    base,
    frame,
    template="premise: {premise} hypothesis: {hypothesis}",
    labels=["no", "yes"],
    length=20,
    steps=200,
    learning_rate=0.3,
    folder="runs/own_data",
)
print(run.prompt)

# %%
predict = pt.Predictor(base, run.prompt)
print(predict([{"premise": "it rains", "hypothesis": "the street is wet"}]))
