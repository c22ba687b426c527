# SPDX-License-Identifier: Apache-2.0

# %% [markdown]
# # A checkpoint from Hugging Face
#
# A name of the hub, or the folder of a copy, is the base model. The extra `hub` brings
# the client that fetches it.

# %%
import prompt_tuning as pt

base = pt.load("google/t5-v1_1-small")

# %% [markdown]
# Without labels answers are free text, decoded token by token.

# %%
train = [
    ("the capital of France", "Paris"),
    ("the capital of Italy", "Rome"),
    ("the capital of Spain", "Madrid"),
]
run = pt.tune(base, train, length=20, steps=200, learning_rate=0.3)
print(pt.Predictor(base, run.prompt, max_answer_length=8)(["the capital of Norway"]))

# %% [markdown]
# In PEFT's layout the prompt is read by `peft`, and
# `run.prompt.push_to_hub("user/capitals")` puts it on the hub.

# %%
run.save("capitals", format="peft")
print(pt.load_prompt("capitals"))
