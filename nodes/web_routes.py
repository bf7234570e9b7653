"""Routes of ComfyUI's own server for the rewards gallery (web/js/gallery.js). They read, and take no arguments."""

import asyncio
import os

import folder_paths
from server import PromptServer, web

from . import gallery
from .record_preference import FOLDER

CLIPS, PREFERENCES = "/intrinsic_reward/clips", "/intrinsic_reward/preferences"


async def get_clips(request):
    found = await asyncio.to_thread(gallery.clips, folder_paths.get_output_directory())
    return web.json_response(found)


async def get_preferences(request):
    folder = os.path.join(folder_paths.get_output_directory(), FOLDER)
    return web.json_response(await asyncio.to_thread(gallery.preference_counts, folder))


def register() -> None:
    """Adds the routes; nothing where there is no server (tests that import the pack without one)."""
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.routes.get(CLIPS)(get_clips)
        server.routes.get(PREFERENCES)(get_preferences)
