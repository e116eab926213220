//! The EHLO reply (RFC 5321 4.1.1.1): which keywords it has, and the same reply with STARTTLS among them.
//!
//! `reply` is always one whole reply, final line included. The first line is a name whatever it spells; keywords stand
//! from the second line on. Lines keep their own line ends and texts; only separators are recomputed.

/// What to change in an EHLO reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Edit {
    /// Offer STARTTLS. Where this is false the server's own offer is taken out: we could not honour it.
    pub offer_starttls: bool,
    /// Take AUTH out: no credentials before TLS.
    pub hide_auth: bool,
}

/// Whether every line of the reply bears 250: the only reply that may be edited.
#[must_use]
pub fn is_all_250(reply: &[u8]) -> bool {
    lines(reply).all(|line| line.starts_with(b"250"))
}

/// Whether the reply offers `keyword`, in any case.
#[must_use]
pub fn offers(reply: &[u8], keyword: &str) -> bool {
    lines(reply).skip(1).any(|line| is_keyword(line, keyword.as_bytes()))
}

/// Appends the edited reply to `out`. An edit of anything but an all-250 reply leaves it as it is.
pub fn edit(reply: &[u8], edit: Edit, out: &mut Vec<u8>) {
    if !is_all_250(reply) {
        out.extend_from_slice(reply);
        return;
    }
    let kept = |line: &&[u8]| {
        let hidden = edit.hide_auth && (is_keyword(line, b"AUTH") || keyword(line).is_some_and(is_old_auth));
        !(hidden || is_keyword(line, b"STARTTLS"))
    };
    let mut all = lines(reply);
    let first = all.next();
    let offer = edit.offer_starttls.then_some(&b"250 STARTTLS\r\n"[..]);
    let mut wanted = first.into_iter().chain(offer).chain(all.filter(kept)).peekable();
    while let Some(line) = wanted.next() {
        let (code, rest) = line.split_at(line.len().min(3));
        out.extend_from_slice(code);
        out.push(if wanted.peek().is_some() { b'-' } else { b' ' });
        let text = rest.strip_prefix(b" ").or_else(|| rest.strip_prefix(b"-")).unwrap_or(rest);
        out.extend_from_slice(text);
    }
}

/// The lines, each with its line end.
fn lines(reply: &[u8]) -> impl Iterator<Item = &[u8]> {
    reply.split_inclusive(|o| *o == b'\n')
}

fn keyword(line: &[u8]) -> Option<&[u8]> {
    line.get(4..).map(<[u8]>::trim_ascii).and_then(|text| text.split(u8::is_ascii_whitespace).next())
}

fn is_keyword(line: &[u8], name: &[u8]) -> bool {
    keyword(line).is_some_and(|k| k.eq_ignore_ascii_case(name))
}

/// `AUTH=LOGIN PLAIN`, the spelling from before RFC 2554.
fn is_old_auth(keyword: &[u8]) -> bool {
    keyword.get(..5).is_some_and(|k| k.eq_ignore_ascii_case(b"AUTH="))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OFFER: Edit = Edit { offer_starttls: true, hide_auth: false };

    fn edited(reply: &str, how: Edit) -> String {
        let mut out = Vec::new();
        edit(reply.as_bytes(), how, &mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn offers_starttls_on_the_second_line() {
        assert_eq!(
            edited("250-h\r\n250-SIZE 9\r\n250 X\r\n", OFFER),
            "250-h\r\n250-STARTTLS\r\n250-SIZE 9\r\n250 X\r\n"
        );
    }

    #[test]
    fn never_takes_the_first_lines_place() {
        assert_eq!(edited("250 h\r\n", OFFER), "250-h\r\n250 STARTTLS\r\n");
        assert_eq!(edited("250 starttls.example\r\n", OFFER), "250-starttls.example\r\n250 STARTTLS\r\n");
        assert_eq!(edited("250 STARTTLS\r\n", OFFER), "250-STARTTLS\r\n250 STARTTLS\r\n");
    }

    #[test]
    fn a_bare_code_is_a_line_too() {
        assert_eq!(edited("250\r\n", OFFER), "250-\r\n250 STARTTLS\r\n");
    }

    #[test]
    fn exactly_one_offer_remains() {
        let expected = "250-h\r\n250-STARTTLS\r\n250 SIZE\r\n";
        assert_eq!(edited("250-h\r\n250-SIZE\r\n250 starttls\r\n", OFFER), expected);
        assert_eq!(edited("250-h\r\n250-STARTTLS \r\n250 SIZE\r\n", OFFER), expected);
        assert_eq!(edited("250-h\r\n250-SIZE\r\n250-STARTTLS\r\n250 StartTLS x\r\n", OFFER), expected);
    }

    #[test]
    fn without_a_certificate_no_offer_remains() {
        let none = Edit { offer_starttls: false, hide_auth: false };
        assert_eq!(edited("250-h\r\n250 STARTTLS\r\n", none), "250 h\r\n");
        assert_eq!(edited("250-h\r\n250 SIZE\r\n", none), "250-h\r\n250 SIZE\r\n");
    }

    #[test]
    fn hides_auth_in_both_spellings() {
        let hide = Edit { offer_starttls: true, hide_auth: true };
        let reply = "250-h\r\n250-AUTH LOGIN\r\n250-auth=PLAIN\r\n250 AUTHX\r\n";
        assert_eq!(edited(reply, hide), "250-h\r\n250-STARTTLS\r\n250 AUTHX\r\n");
    }

    #[test]
    fn leaves_other_replies_alone() {
        for reply in ["502 no\r\n", "550-a\r\n550 b\r\n", "250-a\r\n550 b\r\n"] {
            assert_eq!(edited(reply, OFFER), reply);
        }
    }

    #[test]
    fn kept_lines_keep_their_line_ends() {
        assert_eq!(edited("250-h\n250 SIZE\n", OFFER), "250-h\n250-STARTTLS\r\n250 SIZE\n");
    }

    #[test]
    fn finds_keywords_but_not_in_the_first_line() {
        assert!(offers(b"250-h\r\n250 startTLS\r\n", "STARTTLS"));
        assert!(!offers(b"250-STARTTLS\r\n250 SIZE\r\n", "STARTTLS"));
    }
}
