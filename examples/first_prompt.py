# SPDX-License-Identifier: Apache-2.0

# %% [markdown]
# # A first prompt
#
# A soft prompt is tuned for a small frozen T5 that lies inside the package, and asked.

# %%
import prompt_tuning as pt

base = pt.load("embedded:t5_1_1_mini")

# %% [markdown]
# Examples are pairs of a text and its answer. A few hundred do better than these.

# %%
train = [
    ("a gorgeous , witty film", "positive"),
    ("dull and far too long", "negative"),
    ("a charming story", "positive"),
    ("a tedious mess", "negative"),
]
dev = [("gorgeous and charming", "positive"), ("a dull mess", "negative")]

# %% [markdown]
# The model stays as it was, byte for byte; only 20 vectors move. Since no learning rate
# is given, a few are tried first.

# %%
labels = ["negative", "positive"]
run = pt.tune(base, train, validation=dev, labels=labels, length=20, steps=200)
run.plot()

# %%
run.save("first_prompt.safetensors")
predict = pt.Predictor(base, ["first_prompt.safetensors"])
print(predict(["a gorgeous film", "what a dull story"]))
