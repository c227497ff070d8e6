from tests.explicit_ranks import explicit_ranks

__all__ = ["explicit_ranks"]
