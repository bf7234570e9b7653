"""Events for the panels that this pack's JavaScript (web/js) draws in its nodes."""

from server import PromptServer

RACE, RACE_STEP, SHELL = "intrinsic_reward.race", "intrinsic_reward.race_step", "intrinsic_reward.shell"


def send(event: str, node_id: str | None, data: dict) -> None:
    """Sends JSON values to the browser that queued the running prompt, or to all when that is unknown (API clients)."""
    server = PromptServer.instance
    server.send_sync(event, {"node": None if node_id is None else str(node_id), **data}, server.client_id)
