"""For tests alone: lets Torch-TensorRT for RTX be imported, and build real engines, where there is no NVIDIA driver. Nothing can be executed.

TensorRT-RTX builds without a GPU; only Torch-TensorRT around it asks for one: at import, for the device's properties, and after a
build, when it loads the engine to look at it. Patches this process, so that it is to be used in one of its own.
"""

from __future__ import annotations

import contextlib
import os.path
import types

import torch


def install() -> None:
    """Before torch_tensorrt is imported."""
    assert not torch.cuda.is_available(), "there is a GPU: use it"
    memory = 80 << 30
    device = types.SimpleNamespace(major=9, minor=0, name="stand-in", total_memory=memory, multi_processor_count=132)
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.get_device_properties = lambda given=None: device
    torch.cuda.mem_get_info = lambda device=None: (memory, memory)
    torch.cuda.current_device = lambda: 0
    with contextlib.ExitStack() as stack:
        if not hasattr(torch._C, "_CudaDeviceProperties"):  # a torch without CUDA: a type annotation, and a library that cannot be loaded
            torch._C._CudaDeviceProperties = type("_CudaDeviceProperties", (), {})
            real = os.path.isfile
            os.path.isfile = lambda path: not os.path.basename(str(path)).startswith("libtorchtrt") and real(path)
            stack.callback(setattr, os.path, "isfile", real)
        import torch_tensorrt.dynamo.conversion._TRTInterpreter as interpreter
        import torch_tensorrt.dynamo.runtime._TorchTensorRTModule as runtime
        from torch_tensorrt import _Device

    class Trt:
        """tensorrt_rtx, but engines are not loaded after they were built."""

        def __getattr__(self, name):
            return Runtime if name == "Runtime" else getattr(real_trt, name)

    real_trt, interpreter.trt = interpreter.trt, Trt()
    _Device.Device.to = lambda self, kind: torch.device("cpu")
    runtime.TorchTensorRTModule.setup_engine = lambda self, *args, **kwargs: None
    runtime.TorchTensorRTModule.set_output_tensors_as_unowned = lambda self, *args, **kwargs: None

    from li_compile.exporting.targets import tensorrt

    asked = tensorrt.unavailable  # all but the driver is asked for as ever
    tensorrt.unavailable = lambda: None if "needs an NVIDIA driver" in (asked() or "") else asked()


class Engine:
    """A built engine that is not loaded."""

    def __init__(self, plan):
        self.plan = plan

    def serialize(self):
        return self.plan

    def get_aliased_input_tensor(self, name):
        return ""


class Runtime:
    def __init__(self, logger):
        pass

    def deserialize_cuda_engine(self, plan):
        return None if plan is None else Engine(plan)
