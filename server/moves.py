"""Protocol buffers -> moves of the pointer to the current version."""

from server.delivery import Move
from server.translation import check_policy
from server.violations import Violations
from thumbloop.v1 import admin_pb2

MAX_REASON = 1024


def promotion_of(message: admin_pb2.PromotePolicyVersionRequest, actor: str) -> Move:
    """Return the promotion a caller asks for. Raises InvalidRequest, UnknownPolicy."""
    wrong = _of_move(message)
    wrong.expect(message.HasField("policy_version"), "policy_version", "is missing")
    wrong.raise_if_any()
    return Move(
        to=message.policy_version,
        expected=message.expected_current_version,
        is_rollback=False,
        reason=message.reason,
        actor=actor,
    )


def rollback_of(message: admin_pb2.RollbackPolicyVersionRequest, actor: str) -> Move:
    """Return the rollback a caller asks for. Raises InvalidRequest, UnknownPolicy."""
    _of_move(message).raise_if_any()
    return Move(
        to=message.policy_version if message.HasField("policy_version") else None,
        expected=message.expected_current_version,
        is_rollback=True,
        reason=message.reason,
        actor=actor,
    )


def _of_move(
    message: admin_pb2.PromotePolicyVersionRequest | admin_pb2.RollbackPolicyVersionRequest,
) -> Violations:
    """Return what is wrong with the part that both have in common."""
    check_policy(message.policy)
    wrong = Violations()
    has_expected = message.HasField("expected_current_version")
    wrong.expect(has_expected, "expected_current_version", "is missing")
    wrong.storable(message.reason, MAX_REASON, "reason")
    return wrong
