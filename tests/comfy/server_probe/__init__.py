"""Test only: GET /probe tells what a running server holds, for tests of memory and of threads that are left behind.

The answer has the names of Python's threads and the files that are open; with ?collect=1 also the resident memory before and
after garbage is collected and the C library has given back its free memory, and the tensors that are alive then.
"""

import ctypes
import gc
import sys
import threading

import psutil
import torch
from aiohttp import web
from server import PromptServer


@PromptServer.instance.routes.get("/probe")
async def probe(request):
    process, memory = psutil.Process(), {}
    if request.query.get("collect") == "1":
        memory["rss"] = process.memory_info().rss
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)
        memory["rss_collected"] = process.memory_info().rss
        # By type: isinstance would read attributes of objects that import a library when they are looked at.
        tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
        memory["tensors"] = len(tensors)
        memory["tensor_bytes"] = sum(t.numel() * t.element_size() for t in tensors)
    threads = sorted(t.name for t in threading.enumerate())
    return web.json_response(memory | {"threads": threads, "open_files": sorted(f.path for f in process.open_files())})


NODE_CLASS_MAPPINGS = {}
