"""moss_jax: MOSS-Speech in JAX. Speech goes in, speech comes out, with no text in between.

    import moss_jax

    system = moss_jax.load("FOLDER")
    reply = system.reply([moss_jax.Turn("user", audio="QUESTION.wav")])
    reply.save("ANSWER.wav")

Importing this package loads neither JAX nor the models; they are loaded with the first name that needs them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moss_jax.dialogue import Turn, load
    from moss_jax.errors import MossError

__version__ = "0.2.0"
__all__ = ["MossError", "Turn", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "MossError":
        from moss_jax.errors import MossError

        return MossError
    if name in ("Turn", "load"):
        from moss_jax import dialogue

        return getattr(dialogue, name)
    raise AttributeError(f"module 'moss_jax' has no attribute {name!r}")
