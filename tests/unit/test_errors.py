import copy
import inspect
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from kdcache import errors
from kdcache.errors import CacheCorruptError, CacheError, KDCacheError

ALL = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == "kdcache.errors"]


@pytest.mark.parametrize("kind", ALL)
def test_one_tree_drawn_in_the_docstring(kind):
    assert issubclass(kind, KDCacheError)
    assert kind.__name__ in errors.__doc__
    assert issubclass(kind, CacheError) == (kind.__name__.startswith("Cache") or kind.__name__ == "StoreError")


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("hint", [None, "run it again"])
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickling_keeps_kind_message_and_hint(kind, hint, protocol):
    error = kind("shard 00001: torn", hint=hint)
    for again in (pickle.loads(pickle.dumps(error, protocol)), copy.copy(error)):
        assert (type(again), again.message, again.hint, str(again)) == (kind, error.message, hint, str(error))


def test_message_then_hint():
    assert str(KDCacheError("torn")) == "torn"
    assert str(KDCacheError("torn", hint="mend it")) == "torn\nhint: mend it"


def fail():
    raise CacheCorruptError("shard 00001: torn", hint="mend it")


def test_errors_travel_from_a_worker_process():
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool, pytest.raises(CacheCorruptError) as caught:
        pool.submit(fail).result()
    assert caught.value.hint == "mend it"
