//! What states and ends are called where they are counted: short words that stay as they are, whatever the log says.

use crate::session::{BackendEnd, ChildEnd, ClientEnd, EndReason, Phase, PolicyEnd};

/// Each way a session can end; the last stands for what is not listed.
pub const REASONS: [&str; 32] = [
    "over",
    "terminated",
    "client_closed",
    "client_broke_off",
    "client_bytes_after_starttls",
    "client_bad_lines",
    "client_errors",
    "client_starttls",
    "client_not_smtp",
    "child_not_started",
    "child_differs",
    "child_broke_off",
    "child_closed",
    "child_closed_inside_reply",
    "child_not_smtp",
    "child_killed",
    "child_lost_step",
    "backend_truncated",
    "backend_closed",
    "backend_unasked",
    "backend_broke_off",
    "backend_tls",
    "handover",
    "tls_required",
    "no_certificate",
    "timeout",
    "handshake",
    "tls",
    "engine",
    "system",
    "bug",
    "other",
];

/// The word for an end.
fn word(reason: &EndReason) -> &'static str {
    match reason {
        EndReason::Over => "over",
        EndReason::Terminated => "terminated",
        EndReason::Client(ClientEnd::Gone) => "client_closed",
        EndReason::Client(ClientEnd::BrokeOff) => "client_broke_off",
        EndReason::Client(ClientEnd::BytesAfterStarttls) => "client_bytes_after_starttls",
        EndReason::Client(ClientEnd::BadLines) => "client_bad_lines",
        EndReason::Client(ClientEnd::Errors) => "client_errors",
        EndReason::Client(ClientEnd::Starttls) => "client_starttls",
        EndReason::Client(ClientEnd::NotSmtp) => "client_not_smtp",
        EndReason::Child(ChildEnd::NotStarted(_)) => "child_not_started",
        EndReason::Child(ChildEnd::Differs(_)) => "child_differs",
        EndReason::Child(ChildEnd::BrokeOff) => "child_broke_off",
        EndReason::Child(ChildEnd::Gone) => "child_closed",
        EndReason::Child(ChildEnd::InsideReply) => "child_closed_inside_reply",
        EndReason::Child(ChildEnd::NotSmtp) => "child_not_smtp",
        EndReason::Child(ChildEnd::Killed(_)) => "child_killed",
        EndReason::Child(ChildEnd::LostStep) => "child_lost_step",
        EndReason::Backend(BackendEnd::Truncated) => "backend_truncated",
        EndReason::Backend(BackendEnd::Gone) => "backend_closed",
        EndReason::Backend(BackendEnd::Unasked) => "backend_unasked",
        EndReason::Backend(BackendEnd::BrokeOff) => "backend_broke_off",
        EndReason::Backend(BackendEnd::Tls(_)) => "backend_tls",
        EndReason::Handover(_) => "handover",
        EndReason::Policy(PolicyEnd::TlsRequired) => "tls_required",
        EndReason::Policy(PolicyEnd::NoCertificate) => "no_certificate",
        EndReason::Timeout(_) => "timeout",
        EndReason::Handshake(_) | EndReason::TlsServer(_) => "handshake",
        EndReason::Tls(_) => "tls",
        EndReason::Engine(_) => "engine",
        EndReason::System(_) => "system",
        EndReason::Bug(_) => "bug",
    }
}

/// The place of an end in [`REASONS`].
pub(super) fn reason(reason: &EndReason) -> usize {
    let word = word(reason);
    REASONS.iter().position(|known| *known == word).unwrap_or(REASONS.len() - 1)
}

/// The word for a state; the log calls two of them the same.
#[must_use]
pub fn state(phase: Phase) -> &'static str {
    match phase {
        Phase::Snoop => "snoop",
        Phase::Summon => "summon",
        Phase::Brief => "brief",
        Phase::Dial => "dial",
        Phase::SecureBackend => "backend_handshake",
        Phase::Start => "start",
        Phase::Tell => "proxy_header",
        Phase::Greeting => "backend_greeting",
        Phase::Replay => "replay",
        Phase::Commit => "commit",
        Phase::Announce => "announce",
        Phase::SecureClient => "client_handshake",
        Phase::Gate => "gate",
        Phase::RelayPlain => "relay_plain",
        Phase::RelayTls => "relay_tls",
        Phase::Close => "close",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::{HandoverFailure, Way};

    #[test]
    fn each_end_has_a_word_of_its_own() {
        let text = String::new;
        let step = HandoverFailure { way: Way::Tls, step: Phase::Dial, why: text() };
        let all = [
            EndReason::Over,
            EndReason::Terminated,
            EndReason::Client(ClientEnd::Gone),
            EndReason::Client(ClientEnd::BrokeOff),
            EndReason::Client(ClientEnd::BytesAfterStarttls),
            EndReason::Client(ClientEnd::BadLines),
            EndReason::Client(ClientEnd::Errors),
            EndReason::Client(ClientEnd::Starttls),
            EndReason::Client(ClientEnd::NotSmtp),
            EndReason::Child(ChildEnd::NotStarted(text())),
            EndReason::Child(ChildEnd::Differs(text())),
            EndReason::Child(ChildEnd::BrokeOff),
            EndReason::Child(ChildEnd::Gone),
            EndReason::Child(ChildEnd::InsideReply),
            EndReason::Child(ChildEnd::NotSmtp),
            EndReason::Child(ChildEnd::Killed(9)),
            EndReason::Child(ChildEnd::LostStep),
            EndReason::Backend(BackendEnd::Truncated),
            EndReason::Backend(BackendEnd::Gone),
            EndReason::Backend(BackendEnd::Unasked),
            EndReason::Backend(BackendEnd::BrokeOff),
            EndReason::Backend(BackendEnd::Tls(text())),
            EndReason::Handover(step),
            EndReason::Policy(PolicyEnd::TlsRequired),
            EndReason::Policy(PolicyEnd::NoCertificate),
            EndReason::Timeout(Phase::Snoop),
            EndReason::Handshake(text()),
            EndReason::Tls(text()),
            EndReason::Engine(text()),
            EndReason::System(text()),
            EndReason::Bug(text()),
        ];
        let places: Vec<usize> = all.iter().map(reason).collect();
        assert_eq!(places, (0..REASONS.len() - 1).collect::<Vec<_>>());
    }

    #[test]
    fn states_are_counted_in_the_order_of_their_list() {
        for (place, phase) in Phase::ALL.into_iter().enumerate() {
            assert_eq!(phase as usize, place);
            assert!(Phase::ALL[..place].iter().all(|other| state(*other) != state(phase)), "{phase:?}");
        }
    }
}
