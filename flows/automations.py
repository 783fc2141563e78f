"""What the server does by itself about nights: infra/prefect/automations.yaml, applied by name, as often as liked."""

import os
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).parents[1] / "infra" / "prefect" / "automations.yaml"
ALARM_BLOCK = "unetpp-alarm"
NAMES = (
    "unetpp-zombie",
    "unetpp-resume",
    "unetpp-failed",
    "unetpp-partial",
    "unetpp-late",
    "unetpp-dead-man",
)


def read(alarm_block_id: str | None) -> list[dict[str, Any]]:
    """Return the automations with their `alarm` actions turned into calls of the webhook block, or into nothing."""
    automations: list[dict[str, Any]] = yaml.safe_load(FILE.read_text(encoding="utf-8"))["automations"]
    for automation in automations:
        automation["actions"] = [_action(action, alarm_block_id) for action in automation["actions"]]
    return automations


def apply() -> list[str]:
    """Create or update every automation on the server of PREFECT_API_URL; return what was done, in words."""
    from prefect.client.orchestration import get_client
    from prefect.events.schemas.automations import AutomationCore

    done = []
    block_id = _alarm_block(os.environ.get("UNETPP_ALARM_URL"))
    with get_client(sync_client=True) as client:
        for content in read(block_id):
            wanted = AutomationCore.model_validate(content)
            there = client.read_automations_by_name(wanted.name)
            if there:
                client.update_automation(there[0].id, wanted)
            else:
                client.create_automation(wanted)
            done.append(f"automation {wanted.name} {'updated' if there else 'created'}")
    return done


def _action(action: dict[str, Any], alarm_block_id: str | None) -> dict[str, Any]:
    if action["type"] != "alarm":
        return action
    if alarm_block_id is None:
        return {"type": "do-nothing"}
    # The block posts JSON: the text is quoted after its template is filled in.
    payload = '{"text": {% set text %}' + action["text"] + "{% endset %}{{ text | string | tojson }}}"
    return {"type": "call-webhook", "block_document_id": alarm_block_id, "payload": payload}


def _alarm_block(url: str | None) -> str | None:
    if not url:
        return None
    from prefect.blocks.webhook import Webhook
    from pydantic import SecretStr

    block = Webhook(method="POST", url=SecretStr(url))
    return str(block.save(ALARM_BLOCK, overwrite=True))
