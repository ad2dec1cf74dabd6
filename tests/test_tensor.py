"""The border between NumPy and torch: the same kind out as came in, without copies, bfloat16 included."""

import warnings
import weakref

import ml_dtypes
import numpy as np
import pytest
import torch

from cascade_engine import tensor
from cascade_engine.errors import InvalidInput

KINDS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.mark.parametrize("kind", KINDS)
def test_torch_to_host_and_back_shares_memory_and_bits(kind):
    given = torch.randn(4, 3).to(KINDS[kind])
    host = tensor.to_host(given, "x")
    assert host.dtype == tensor.FEATURE_DTYPES[kind]
    assert host.ctypes.data == given.data_ptr()
    back = tensor.like(host, given)
    assert back.data_ptr() == given.data_ptr()
    assert back.dtype == given.dtype
    assert torch.equal(back, given)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [np.s_[:], np.s_[::2, 1:], np.s_[:0]], ids=["whole", "strided", "empty"])
def test_what_cannot_be_written_to_is_shared_without_a_warning(kind, cut):
    host = np.arange(12, dtype=np.float32).reshape(4, 3).astype(tensor.FEATURE_DTYPES[kind])
    address, values = host.ctypes.data, host.astype(np.float32)
    host.flags.writeable = False
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = tensor.shared(host[cut])
    finally:
        torch.set_warn_always(False)
    assert found.dtype == KINDS[kind]
    assert 0 <= found.data_ptr() - address < host.nbytes or not found.numel()
    holder = weakref.ref(host)
    del host
    assert holder() is not None, "the tensor must hold the memory"
    assert torch.equal(found.float(), torch.from_numpy(values[cut]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [np.s_[::-1], np.s_[:, ::-1], np.s_[::-2, 1:], np.s_[:1:-1]], ids=str)
def test_what_runs_backwards_becomes_a_tensor_of_the_same_values(kind, cut):
    host = np.arange(12, dtype=np.float32).reshape(4, 3).astype(tensor.FEATURE_DTYPES[kind])
    found = tensor.shared(host[cut])
    assert found.dtype == KINDS[kind]
    assert found.tolist() == host[cut].tolist()


def test_what_tensors_have_no_layout_for_becomes_one_of_the_same_values():
    ids = np.array([3, -1, 1 << 40])
    fields = np.zeros(3, np.dtype([("flag", np.int8), ("id", np.int64)]))
    fields["id"] = ids
    for array in (ids.astype(">i8"), fields["id"]):
        found = tensor.shared(array)
        assert found.dtype == torch.int64
        assert found.tolist() == ids.tolist()


def test_a_transposed_bfloat16_tensor_keeps_its_values():
    given = torch.randn(4, 6).bfloat16().T
    host = tensor.to_host(given, "x")
    assert host.shape == (6, 4)
    assert np.array_equal(host.astype(np.float32), given.float().numpy())


def test_numpy_stays_numpy():
    x = np.ones((2, 2))
    assert tensor.to_host(x, "x") is x
    assert tensor.like(x, np.zeros(1)) is x


def test_names_and_devices():
    assert tensor.dtype_name(torch.zeros(1).bfloat16()) == tensor.dtype_name(np.zeros(1, ml_dtypes.bfloat16))
    assert tensor.device_of(torch.zeros(1)) == tensor.device_of([1]) == "cpu"
    assert tensor.device_of(torch.zeros(1, device="meta")) == "meta"
    with pytest.raises(InvalidInput, match="x: expected data on the CPU, got a tensor on meta"):
        tensor.to_host(torch.zeros(1, device="meta"), "x")


def test_gradients_are_detached():
    assert tensor.to_host(torch.ones(2, requires_grad=True), "x").tolist() == [1, 1]


@pytest.mark.parametrize("value", [None, "abc", object(), {"a": 1}, [[1], [1, 2]]])
def test_what_is_no_array_of_numbers_is_refused(value):
    with pytest.raises(InvalidInput, match="x: expected"):
        tensor.feature_matrix(value, "x")


def test_ids():
    assert tensor.id_vector([3, 1], "x", 2).dtype == np.int64
    assert tensor.id_vector([], "x", 0).tolist() == []
    hashes = np.array([2**64 - 1, 2**63, 2**63 - 1, 0], np.uint64)
    assert len(set(tensor.id_vector(hashes, "x", 4).tolist())) == 4, "ids that are hashes stay distinct"
    with pytest.raises(InvalidInput, match="x: expected"):
        tensor.id_vector(np.array([True]), "x", 1)
