//! Whether a server takes mail for others from whom it takes us for. Nothing is mailed: MAIL and RCPT, and RSET takes them back.

use core::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use crate::client_info;
use crate::engine::talk::{Reply, Talk};

/// Whose mail nobody here takes, and who reads none (RFC 2606).
pub(super) const STRANGER: &str = "starttls-wrapper-check@example.com";

/// Who we then are, beside the empty sender, which some refuse: at MAIL, or (Postfix: `smtpd_delay_reject`) not before RCPT.
const SENDER: &str = "postmaster@example.net";

/// An outside client's address (RFC 5737, TEST-NET-1), and its port.
pub(super) const OUTSIDE: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 25));
pub(super) const OUTSIDE_PORT: u16 = 40025;

/// The answer.
#[derive(Debug)]
pub(super) enum Relays {
    /// It would take it.
    Yes(Reply),
    /// It would not.
    No(Reply),
    /// It would not say.
    Unclear(String),
}

/// Asks a server that was greeted and told EHLO. It is left as it was. It does not relay if it takes the mail from neither sender.
pub(super) fn ask(talk: &mut Talk, patience: Duration) -> Result<Relays, String> {
    let nobodys = talk.ask("MAIL FROM:<>", patience)?;
    if nobodys.code.class() != b'5' {
        let answer = ask_by(nobodys, talk, patience)?;
        if !matches!(answer, Relays::No(_)) {
            return Ok(answer);
        }
    }
    let mail = talk.ask(&format!("MAIL FROM:<{SENDER}>"), patience)?;
    ask_by(mail, talk, patience)
}

/// By the sender to whom it has said this.
fn ask_by(mail: Reply, talk: &mut Talk, patience: Duration) -> Result<Relays, String> {
    if !mail.is_good() {
        // That may be no to the sender, and nothing of the recipient; 530 (RFC 3207, RFC 4954) is to whoever is not known.
        return Ok(if mail.code.is(b"530") {
            Relays::No(mail)
        } else {
            Relays::Unclear(format!("it answered {mail} to MAIL"))
        });
    }
    let recipient = talk.ask(&format!("RCPT TO:<{STRANGER}>"), patience)?;
    let answer = if recipient.is_good() {
        Relays::Yes(recipient)
    } else if is_refusal(&recipient) {
        Relays::No(recipient)
    } else {
        Relays::Unclear(format!("it answered {recipient} to RCPT"))
    };
    // The answer stands, whatever becomes of the connection.
    let _ = talk.ask("RSET", patience);
    Ok(answer)
}

/// Whether that is no to us, and not to the address: for good, or not now for want of permission, as Debian sets Postfix up
/// (`defer_unauth_destination`). Who puts strangers off (greylisting) says 450 or 451.
fn is_refusal(reply: &Reply) -> bool {
    match (reply.code.class(), reply.subject()) {
        (b'5', subject) => !matches!(subject, Some(b"1" | b"4")),
        (b'4', Some(b"7")) => reply.code.is(b"454"),
        _ => false,
    }
}

/// Our end of an outside client's connection: what the UCSPI server says, where there is one.
pub(super) fn local_end() -> SocketAddr {
    let usual = SocketAddr::from(([127, 0, 0, 1], 25));
    let ends = client_info::ends(|name| std::env::var_os(name), || Some([usual; 2]));
    ends.map_or(usual, |[_, local]| local)
}
