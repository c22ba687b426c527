# SPDX-License-Identifier: Apache-2.0
"""What a tuning method is: what moves, where it starts, what the network sees of it.

A method is a file beside this one with a frozen dataclass, whose fields are its options::

    @dataclasses.dataclass(frozen=True)
    class Shifted(Method, kind="shifted_prompt"):
        '''Rows that move together.'''

        def init(self, key, start):
            return {"rows": start.rows, "shift": jnp.zeros(start.rows.shape[1:])}

        def rows(self, leaves, base):
            return jax.lax.stop_gradient(leaves["rows"]) + leaves["shift"]

Nothing else knows its name; `docs/adding_a_method.md` goes through one.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from prompt_tuning import trees, values
from prompt_tuning.errors import UserError
from prompt_tuning.network import adapters
from prompt_tuning.network.adapters import COLLECTION, Slot
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.types import Array, Params

TUNED, FROZEN = "tuned", "frozen"
# Among the parameters that nobody moves, what methods hold of their own, by member.
HELD = "held"
# Of each method that is known, its class, by its kind.
METHODS: dict[str, type["Method"]] = {}

# From what a member tunes, and the leaves that nobody moves, to the part of the network's
# parameters that it stands for.
Materialize = Callable[[Params, Params], Params]
# What a member's loss has beside that of its examples, of the same.
Penalty = Callable[[Params, Params], Array]
# From the rows of a pupil and those of its teacher, [P, H] each, to how far apart their
# answers to a member's examples are.
Compare = Callable[[Array, Array], Array]
# What a member's loss has beside that for its answers to examples.
Lesson = Callable[[Params, Params, Compare], Array]
# What a method tunes for one prompt: an array, or named ones.
Leaves = Any


class Start(NamedTuple):
    """What the leaves of a method may start from.

    Attributes:
      rows: the prompt as its initialisation gives it: [P, H] float32.
      table: the embedding table: [V, H].
      base: the base model's parameters.
      saved: the prompts that `Method.reads` names: [P, H] each.
    """

    rows: Array
    table: Array
    base: Params
    saved: Sequence[Array] = ()


class Method:
    """A tuning method; this one is told what to be by its subclasses.

    What it tunes are its `init`'s leaves, float32. `rows` makes the prompt of them that
    the network looks up, `slots` what its layers hold beside their weights: within the
    training step, so that gradients reach the leaves, and once more when the result is
    saved. So what is saved is what the network reads, whatever it was made of.

    Attributes:
      kind: its name in cards and on command lines.
      rules: which of the network's own parameters it moves, as ordered path rules.
      has_prompt: whether it wants virtual tokens in the input.
      uses_rows: whether its leaves start from `Start.rows`.
      learning_rate: the usual one of Adafactor, which its gin file has, too; rates are
        tried around it where nobody chose one.
    """

    kind: ClassVar[str]
    rules: ClassVar[trees.Rules] = ((r"prompts/.*", TUNED), (r".*", FROZEN))
    has_prompt: ClassVar[bool] = True
    uses_rows: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 0.3

    def __init_subclass__(cls, *, kind: str, **kwargs: Any):
        """Makes the method known by its kind.

        Raises:
          ValueError: another method is called so.
        """
        super().__init_subclass__(**kwargs)
        known = METHODS.get(kind)
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise ValueError(f"two methods are called {kind!r}: {known} and {cls}")
        cls.kind = kind
        METHODS[kind] = cls

    def __post_init__(self):
        """Refuses options of another kind than their annotations say.

        Raises:
          UserError: names all that are refused, and what is wanted.
        """
        own = type(self)
        given = {field.name: getattr(self, field.name) for field in _fields(self)}
        values.check(own, given, lambda name: f"{own.__name__}.{name}")

    def describe(self) -> str:
        """Its kind and the options that are not the default.

        >>> from prompt_tuning.methods.residual_prompt import ResidualPrompt
        >>> ResidualPrompt().describe(), ResidualPrompt(bottleneck=64).describe()
        ('residual_prompt', 'residual_prompt(bottleneck=64)')
        """
        usual = type(self)()
        chosen = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in _fields(self)
            if getattr(self, field.name) != getattr(usual, field.name)
        ]
        return f"{self.kind}({', '.join(chosen)})" if chosen else self.kind

    @property
    def is_plain(self) -> bool:
        """Whether what it tunes is what the network reads, leaf by leaf."""
        own = type(self)
        return own.rows is Method.rows and own.slots is Method.slots

    @property
    def result(self) -> Literal["prompt", "adapter", "model"]:
        """What a run with it ends with."""
        if self.has_prompt:
            return "prompt"
        return "model" if self.is_plain else "adapter"

    def init(self, key: Array, start: Start) -> Leaves:
        """The leaves at step 0, float32."""
        del key
        return start.rows

    def reads(self) -> Sequence[str]:
        """The paths of saved prompts that it starts from or holds."""
        return ()

    def held(self, start: Start) -> Params:
        """Arrays of its own that never move: later ``base[HELD]``, by these names."""
        del start
        return {}

    def rows(self, leaves: Leaves, base: Params) -> Array:
        """The prompt [P, H] that the leaves stand for.

        Args:
          leaves: what `init` gave, tuned.
          base: the parameters that nobody moves, as the network has them.
        """
        del base
        return leaves

    def slots(self, leaves: Leaves, base: Params) -> Mapping[str, Slot]:
        """What the leaves put into the layers, by the path of the site.

        Args:
          leaves: what `init` gave, tuned.
          base: the parameters that nobody moves, as the network has them.
        """
        del leaves, base
        return {}

    def penalty(self, leaves: Leaves, base: Params) -> Array | float:
        """What is added to the loss of a step, once for all examples of its batch.

        Args:
          leaves: what `init` gave, tuned.
          base: the parameters that nobody moves, as the network has them.
        """
        del leaves, base
        return 0.0

    @property
    def has_penalty(self) -> bool:
        """Whether there is a `penalty`; without one a step does not ask."""
        return type(self).penalty is not Method.penalty

    def lesson(self, leaves: Leaves, base: Params, compare: Compare) -> Array | float:
        """What is added to the loss of a step for other prompts' answers to its batch.

        Args:
          leaves: what `init` gave, tuned.
          base: the parameters that nobody moves, as the network has them.
          compare: see `network.comparison.comparer`; each call reads the batch twice.
        """
        del leaves, base, compare
        return 0.0

    @property
    def comparisons(self) -> int:
        """How often its `lesson` calls ``compare``: what the step's costs count."""
        return 0

    @property
    def has_lesson(self) -> bool:
        """Whether there is a `lesson`; without one a step does not ask."""
        return type(self).lesson is not Method.lesson

    @property
    def beside_examples(self) -> dict[str, Any]:
        """What a member's loss has beside that of its examples, by its field's name."""
        return {
            "penalty": self.penalize if self.has_penalty else None,
            "lesson": self.teach if self.has_lesson else None,
        }

    def rate_factors(self) -> Mapping[str, float]:
        """By the name of a leaf, or of a dict of leaves, the multiple of its rate."""
        return {}

    def optimizer(
        self, tx: optax.GradientTransformation
    ) -> optax.GradientTransformation:
        """The optimizer of a member's leaves, where `place` has put them."""
        factors = self.rate_factors()
        if all(factor == 1 for factor in factors.values()):
            return tx

        def scaled(path: tuple[Any, ...], update: Array) -> Array:
            # Below the collection and the member's name.
            return update * factors.get(path[2].key, 1.0)

        return optax.chain(
            tx,
            optax.stateless(
                lambda updates, params: jax.tree.map_with_path(scaled, updates)
            ),
        )

    def split(self, params: Params) -> tuple[Params, Params]:
        """Parts a model that it tunes into what moves and what does not.

        Raises:
          UserError: the model lacks what it is told to move.
        """
        return split(params, self.rules)

    def place(self, name: str, leaves: Leaves) -> Params:
        """A member's leaves where they stand among the parameters of a run."""
        return {"prompts" if self.has_prompt else COLLECTION: {name: leaves}}

    def materialize(self, tuned: Params, base: Params) -> Params:
        """A member's part of the network's parameters.

        Returns:
          Its prompt as ``prompts/NAME``; its slots, by their sites, as ``adapters``.
        """
        if self.is_plain:
            return tuned
        where, name, leaves = _parted(tuned)
        base = with_own(base, name)
        part: dict[str, Any] = {COLLECTION: self.slots(leaves, base)}
        if where == "prompts":
            part["prompts"] = {name: self.rows(leaves, base)}
        return part

    def penalize(self, tuned: Params, base: Params) -> Array:
        """The `penalty` of a member.

        Args:
          tuned: its leaves where `place` has put them.
          base: the parameters that nobody moves.
        """
        _, name, leaves = _parted(tuned)
        return jnp.asarray(self.penalty(leaves, with_own(base, name)))

    def teach(self, tuned: Params, base: Params, compare: Compare) -> Array:
        """The `lesson` of a member.

        Args:
          tuned: its leaves where `place` has put them.
          base: the parameters that nobody moves.
          compare: how far apart two prompts' answers to its examples are.
        """
        _, name, leaves = _parted(tuned)
        return jnp.asarray(self.lesson(leaves, with_own(base, name), compare))


def _fields(method: Method) -> tuple[dataclasses.Field, ...]:
    """The options of a method, which is a dataclass where it has any."""
    return dataclasses.fields(method) if dataclasses.is_dataclass(method) else ()


def split(params: Params, rules: trees.Rules) -> tuple[dict, dict]:
    """Parts ``params`` into the (tuned, frozen) trees.

    Raises:
      ValueError: a leaf has no rule, or nothing is tuned.
    """
    label_tree = trees.labels(params, rules)
    tuned = trees.select(params, label_tree, TUNED)
    if not tuned:
        raise ValueError("no parameter is tuned: the method's rules match no leaf")
    return tuned, trees.select(params, label_tree, FROZEN)


def with_own(base: Params, name: str) -> Params:
    """Parameters where ``HELD`` is what one member, or one part of it, holds."""
    return {**base, HELD: base[HELD].get(name, {})} if HELD in base else base


def _parted(tuned: Params) -> tuple[str, str, Leaves]:
    """Where leaves have been placed, under which name, and the leaves."""
    ((where, members),) = tuned.items()
    ((name, leaves),) = members.items()
    return where, name, leaves


def named(method: Method | str) -> Method:
    """A method, or the one of this kind with its default options.

    Raises:
      UserError: no method is of this kind.
    """
    if isinstance(method, Method):
        return method
    if method not in METHODS:
        raise UserError(
            f"no method is called {method!r}; choose {', '.join(sorted(METHODS))}"
        )
    return METHODS[method]()


def assemble(
    parts: Mapping[str, Params], members: Sequence[str], bank: Sequence[Prompt] = ()
) -> dict[str, Any]:
    """Parameters of the network that members' parts are together.

    Args:
      parts: what `Method.materialize` gave for each of those who take part.
      members: the names of all, in the order of their numbers.
      bank: the network's prompts.
    """
    own = [{k: v for k, v in p.items() if k != COLLECTION} for p in parts.values()]
    params = trees.merge(*own)
    slots = {
        members.index(name): part[COLLECTION]
        for name, part in parts.items()
        if part.get(COLLECTION)
    }
    if not slots:
        return params
    ends = itertools.accumulate(prompt.length for prompt in bank)
    places = {p.name: slice(end - p.length, end) for p, end in zip(bank, ends)}
    positions = [places.get(name, slice(0, 0)) for name in members]
    return {**params, COLLECTION: adapters.join(slots, len(members), positions)}


def as_is(tuned: Params, base: Params) -> Params:
    """The `Materialize` of members whose leaves are the network's own."""
    del base
    return tuned


def depth_of(base: Params) -> int:
    """The layers of a model's encoder."""
    return base["encoder"]["layers"]["pre_mlp_layer_norm"]["scale"].shape[0]


def within_width(method: Method, name: str, width: int) -> None:
    """Refuses a size that is above the width of the model.

    Raises:
      UserError: says what it is and what the model has.
    """
    value = getattr(method, name)
    if value > width:
        raise UserError(
            f"{type(method).__name__}.{name}={value} is more than the width of the "
            f"model ({width}); lower it"
        )


def torch_uniform(key: Array, shape: tuple[int, ...], fan_in: int) -> Array:
    """What PyTorch's ``Linear`` starts from: uniform within ``1 / sqrt(fan_in)``."""
    bound = fan_in**-0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def linear(key: Array, inputs: int, outputs: int) -> dict[str, Array]:
    """The leaves of a linear map as PyTorch starts it: [inputs, outputs], [outputs]."""
    kernel, bias = jax.random.split(key)
    return {
        "kernel": torch_uniform(kernel, (inputs, outputs), inputs),
        "bias": torch_uniform(bias, (outputs,), inputs),
    }


def apply_linear(leaves: Params, x: Array) -> Array:  # [..., inputs] -> [..., outputs]
    """What `linear` computes."""
    y = product(x, leaves["kernel"])
    return y + jax.lax.broadcast_to_rank(leaves["bias"], y.ndim)


def product(a: Array, b: Array) -> Array:
    """The matrix product in float32, which TPUs would else round to bfloat16."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
