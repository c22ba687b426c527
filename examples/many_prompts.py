# SPDX-License-Identifier: Apache-2.0

# %% [markdown]
# # Many prompts, and what they say together
#
# Three seeds are tuned side by side on one copy of the model, each as it would be alone.

# %%
import prompt_tuning as pt

base = pt.load("embedded:t5_1_1_mini")
train = [
    ("a gorgeous , witty film", "positive"),
    ("dull and far too long", "negative"),
    ("a charming story", "positive"),
    ("a tedious mess", "negative"),
]
dev = [("gorgeous and charming", "positive"), ("a dull mess", "negative")]
run = pt.tune(
    base,
    train,
    validation=dev,
    labels=["negative", "positive"],
    length=20,
    steps=200,
    learning_rate=0.3,
    prompts=[{"seed": [0, 1, 2]}],
)
for name, prompt in run.prompts.items():
    print(name, prompt.card["metric"])

# %% [markdown]
# The prompts vote; every answer says what each of them gave.

# %%
together = pt.Predictor(base, list(run.prompts.values()), combine="vote")
print(together(["a gorgeous film"]))
