"""The reasons for which a solve fails, in plain words."""

import enum


class Cause(enum.Enum):
    """Why a solve fails, or why its result is not to be trusted.

    The value of a member is its name in reports, ``meaning`` says it in a sentence, and ``advice`` is what can be done
    about it that a diagnosis does not try.
    """

    meaning: str
    advice: str

    def __new__(cls, value: str, meaning: str = "", advice: str = "") -> "Cause":
        member = object.__new__(cls)
        member._value_ = value
        member.meaning = meaning
        member.advice = advice
        return member

    MAP_CHANGES = (
        "the map changes",
        "The map, or F, is not the same in every call, so there is no equation to solve.",
        "draw random numbers before the solve and pass them to the map (implicit.dropout_mask).",
    )
    SAMPLES_MIX = (
        "samples mix",
        "What the map, or F, returns for one sample depends on the other samples of the batch.",
        "use GroupNorm or LayerNorm in the map, or batch_dims=0 for one coupled problem.",
    )
    NOT_FINITE = (
        "not finite",
        "The map, or F, returns NaN or infinity at the start.",
        "check the inputs and the map at the start.",
    )
    SLOW_CONTRACTION = (
        "slow contraction",
        "The map contracts, but so little that each plain step removes only a small part of the error.",
    )
    TOO_FEW_STEPS = (
        "too few steps",
        "The steps lead to the solution, but max_steps ends the solve before the tolerance is met.",
    )
    EXPANSION = (
        "expansion",
        "Near the equilibrium the map moves points away from it along a direction, so plain steps cannot reach "
        "it, damped or not.",
        "bound the map with implicit.spectral_norm, or add implicit.jacobian_regularization to the loss.",
    )
    OSCILLATION = (
        "oscillation",
        "Plain steps overshoot the equilibrium: the Jacobian has a leading eigenvalue that is negative, or a "
        "complex pair.",
    )
    TRANSIENT = (
        "non-normal transient",
        "The map contracts in the long run, but its Jacobian is far from normal: errors grow for many steps first.",
    )
    LIMIT_CYCLE = (
        "limit cycle",
        "Plain steps settle on a cycle around the equilibrium and do not come closer to it.",
    )
    SEVERAL_EQUILIBRIA = (
        "several equilibria",
        "There are several equilibria, and a small change of the start leads to another one.",
        "bound the map with implicit.spectral_norm: a contraction has one equilibrium.",
    )
    NO_EQUILIBRIUM = (
        "no equilibrium",
        "No solver finds a state that the map returns unchanged; there seems to be none.",
        "bound the map with implicit.spectral_norm, or put the normalization after the residual connection: z + "
        "g(z) has an equilibrium only where g vanishes.",
    )
    DOMAIN_LEFT = (
        "domain left",
        "Steps of the solver leave the region where the map contracts, or where it or F is defined; steps of another "
        "solver stay.",
    )
    PRECISION_FLOOR = (
        "precision floor",
        "Rounding inside the map or F, of a lower precision or of nearly equal numbers, is larger than the tolerance.",
        "run the map in float32 or float64, outside of autocast.",
    )
    TOLERANCE_TOO_TIGHT = (
        "tolerance too tight",
        "The tolerance asks for more digits than the dtype of the state holds.",
        "solve in float64 if you need so many digits.",
    )
    TOLERANCE_TOO_LOOSE = (
        "tolerance too loose",
        "The solve converges, but the value is far from the solution: the residual is small and the error is not.",
    )
    START_TOO_FAR = (
        "start too far",
        "Near the solution the solve converges fast, but the start is so far away that the steps are used up before.",
        "start from an earlier solution of the same sample (implicit.WarmStart).",
    )
    NO_ROOT = (
        "no root",
        "No solver finds a root from any start that was tried: |F| has a minimum that is not zero, or falls only while "
        "the state grows without end.",
        "check the equations and their inputs, or minimize the sum of squares if an approximate solution will do.",
    )
    LOCAL_MINIMUM = (
        "local minimum",
        "The solve ends where |F| is not zero and no small step reduces it; another solver or start finds a root.",
        "start closer to the root.",
    )
    SINGULAR_JACOBIAN = (
        "singular Jacobian",
        "The Jacobian of F, which is z - f(z) for a map f, is singular at the solution, or nearly so: it is a multiple "
        "one, or one of a continuum. Steps converge slowly, digits are lost, and the solution has no derivative.",
        "remove the common factor of the equations, or add the equation that is missing.",
    )
    UNSUITED_SOLVER = (
        "unsuited solver",
        "There is a regular root, and another solver or start leads to it; the steps of this solver do not.",
    )
    UNKNOWN = (
        "unknown",
        "The solve fails for a reason that these checks do not find.",
        "look at the residuals with diagnosis.plot().",
    )
