# SPDX-License-Identifier: Apache-2.0
"""Multitask prompt tuning (MPT, Wang et al. 2023, https://arxiv.org/abs/2303.02861).

A prompt of a task is a shared one times a matrix of rank one, element by element:
``P_k = P * (u_k v_k^T)``. Both vectors start as ones, so that the start is the shared
prompt itself: the start of PEFT, small random numbers, wipes it out.

To carry what several tasks share to another, start from a prompt of all of them (a run
over their mixture), and tune this from there. Or name prompts that were tuned on these
tasks as teachers: the shared prompt is then distilled from them while the task is tuned,
each teacher being the shared prompt times vectors of its own. Two ways may be joined. The
prompts themselves are drawn together, which needs no pass of the model. And, as in the
paper, what the model says and holds with the pupil's product is drawn to what it says and
holds with the teacher. The paper does so on the rows of each teacher's task; a run has rows
of one task, and all teachers are asked about these.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax.numpy as jnp

from prompt_tuning.errors import UserError
from prompt_tuning.methods.method import HELD, Compare, Leaves, Method, Start
from prompt_tuning.types import Array, Params, PathText


@dataclasses.dataclass(frozen=True)
class MultitaskPrompt(Method, kind="multitask_prompt"):
    """``P + H`` numbers of the task's own, as many of each teacher, and the shared ``P H``.

    Attributes:
      teachers: the files of prompts that are distilled; they must be as long as this one.
      distillation: weight of the distance to them.
      answers: weight of the distance of answers to those with them (the paper's lambda,
        which is 0.9 there): per target token, weighted and divided as the loss is, the
        Kullback-Leibler divergence of the pupil's distribution from the teacher's and the
        mean squared distance of the decoder's last states. 0 for none, which saves two
        passes of the model for each teacher.
    """

    teachers: Sequence[PathText] = ()
    distillation: float = 0.01
    answers: float = 0.0

    def __post_init__(self):
        if isinstance(self.teachers, str):
            raise UserError(
                f"MultitaskPrompt.teachers={self.teachers!r} must be a list of files, "
                f"e.g. ('{self.teachers}',)"
            )
        super().__post_init__()
        if not self.distillation > 0:
            raise UserError(
                f"MultitaskPrompt.distillation={self.distillation} must be above 0: "
                "leave the teachers out for none"
            )
        if not self.answers >= 0:
            raise UserError(
                f"MultitaskPrompt.answers={self.answers} must be 0 or more: 0 is for none"
            )
        if self.answers and not self.teachers:
            raise UserError(
                f"MultitaskPrompt.answers={self.answers} draws to answers of teachers, "
                "and there are none: name their files as TEACHERS"
            )
        object.__setattr__(self, "teachers", tuple(self.teachers))

    def reads(self) -> Sequence[str]:
        """The teachers."""
        return self.teachers

    def held(self, start: Start) -> Params:
        """The teachers' rows, [K, P, H].

        Raises:
          UserError: one has another shape than this prompt.
        """
        shape = tuple(start.rows.shape)
        for name, prompt in zip(self.teachers, start.saved, strict=True):
            if tuple(prompt.shape) != shape:
                raise UserError(
                    f"{name} is a prompt of {list(prompt.shape)}, where this one is "
                    f"{list(shape)}: take teachers of this model and of PROMPT_LENGTH"
                )
        if not self.teachers:
            return {}
        return {"teachers": jnp.stack([jnp.asarray(each) for each in start.saved])}

    def init(self, key: Array, start: Start) -> Leaves:
        """The rows are the shared prompt; the vectors of task and teachers are ones."""
        del key
        length, width = start.rows.shape
        own: Leaves = {"left": jnp.ones(length), "right": jnp.ones(width)}
        if self.teachers:
            count = len(self.teachers)
            lefts, rights = jnp.ones((count, length)), jnp.ones((count, width))
            own["of_teachers"] = {"left": lefts, "right": rights}
        return {"shared": start.rows, **own}

    def rows(self, leaves: Leaves, base: Params) -> Array:
        """The product [P, H]."""
        del base
        return _product(leaves["shared"], leaves)

    def penalty(self, leaves: Leaves, base: Params) -> Array | float:
        """The weighted distance of each teacher's product to its rows.

        It is the squared distance, summed over the width and averaged over rows and
        teachers, and is added once to the loss of a step.
        """
        if not self.teachers:
            return 0.0
        found = _product(leaves["shared"], leaves["of_teachers"])  # [K, P, H]
        distance = jnp.sum(jnp.square(found - base[HELD]["teachers"]), axis=-1)
        return self.distillation * jnp.mean(distance)

    @property
    def has_penalty(self) -> bool:
        """Only teachers bring one."""
        return bool(self.teachers)

    def lesson(self, leaves: Leaves, base: Params, compare: Compare) -> Array | float:
        """The weighted distance of answers, averaged over the teachers."""
        if not self.has_lesson:
            return 0.0
        pupils = _product(leaves["shared"], leaves["of_teachers"])  # [K, P, H]
        pairs = zip(pupils, base[HELD]["teachers"], strict=True)
        apart = [compare(pupil, teacher) for pupil, teacher in pairs]
        return self.answers * jnp.mean(jnp.stack(apart))

    @property
    def comparisons(self) -> int:
        """Once with each teacher."""
        return len(self.teachers) if self.has_lesson else 0

    @property
    def has_lesson(self) -> bool:
        """Only teachers whose answers count bring one."""
        return self.answers > 0


def _product(shared: Array, vectors: Mapping[str, Array]) -> Array:
    """The shared prompt [P, H] times ``left [..., P]`` and ``right [..., H]``."""
    lefts, rights = vectors["left"][..., None], vectors["right"][..., None, :]
    shape = (*lefts.shape[:-1], rights.shape[-1])
    return jnp.broadcast_to(shared, shape) * lefts * rights
