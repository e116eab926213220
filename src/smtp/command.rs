//! Commands: how a client's line is named, stricter than any server behind us would name it.
//!
//! Two readings of the same octets. The *strict* one (RFC 5321 4.1.1: the verb ends at the first blank) decides what we
//! serve ourselves. The *loose* one undoes what the most lenient tokenisers undo (Postfix skips leading blanks and
//! removes quotes and backslashes) and decides what must never slip through as something else. The loose reading is
//! only ever used to be more careful.

/// A command verb that the snooper knows (RFC 5321 4.1, 3207, 4954, 3030, 1985, 4468 and what Postfix adds).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Verb {
    /// RFC 5321 4.1.1.1.
    Ehlo,
    /// RFC 5321 4.1.1.1.
    Helo,
    /// RFC 3207.
    Starttls,
    /// RFC 5321 4.1.1.9.
    Noop,
    /// RFC 5321 4.1.1.5.
    Rset,
    /// RFC 5321 4.1.1.6.
    Vrfy,
    /// RFC 5321 4.1.1.7.
    Expn,
    /// RFC 5321 4.1.1.8.
    Help,
    /// RFC 5321 4.1.1.10.
    Quit,
    /// RFC 5321 4.1.1.2.
    Mail,
    /// RFC 5321 4.1.1.3.
    Rcpt,
    /// RFC 5321 4.1.1.4.
    Data,
    /// RFC 3030.
    Bdat,
    /// RFC 4954.
    Auth,
    /// RFC 1985.
    Etrn,
    /// RFC 821.
    Turn,
    /// RFC 2645.
    Atrn,
    /// RFC 821.
    Send,
    /// RFC 821.
    Soml,
    /// RFC 821.
    Saml,
    /// RFC 4468.
    Burl,
    /// Postfix: claims to be another client.
    Xclient,
    /// Postfix: claims to be another client, for the log.
    Xforward,
    /// No SMTP at all: another protocol's method or header.
    Foreign,
    /// STARTTLS as only a lenient tokeniser would read it.
    Disguised,
    /// Anything else.
    Unknown,
}

/// What verbs have in common, for all who decide by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// EHLO, HELO: the client says who it is.
    Hello,
    /// Changes nothing that a later TLS would have to know.
    Harmless,
    /// STARTTLS.
    Starttls,
    /// Can carry mail, credentials or the role of the speaker, and so ends the snooping.
    Cutoff,
    /// Claims to be another client: ours to say alone.
    Claim,
    /// No SMTP at all.
    Foreign,
    /// STARTTLS as only a lenient tokeniser would read it.
    Disguised,
    /// Anything else.
    Unknown,
}

const NAMES: [(&str, Verb); 27] = [
    ("EHLO", Verb::Ehlo),
    ("HELO", Verb::Helo),
    ("STARTTLS", Verb::Starttls),
    ("NOOP", Verb::Noop),
    ("RSET", Verb::Rset),
    ("VRFY", Verb::Vrfy),
    ("EXPN", Verb::Expn),
    ("HELP", Verb::Help),
    ("QUIT", Verb::Quit),
    ("MAIL", Verb::Mail),
    ("RCPT", Verb::Rcpt),
    ("DATA", Verb::Data),
    ("BDAT", Verb::Bdat),
    ("AUTH", Verb::Auth),
    ("ETRN", Verb::Etrn),
    ("TURN", Verb::Turn),
    ("ATRN", Verb::Atrn),
    ("SEND", Verb::Send),
    ("SOML", Verb::Soml),
    ("SAML", Verb::Saml),
    ("BURL", Verb::Burl),
    ("XCLIENT", Verb::Xclient),
    ("XFORWARD", Verb::Xforward),
    // What a browser tricked into speaking to port 25 would say (ALPACA; Postfix smtpd_forbidden_commands).
    ("GET", Verb::Foreign),
    ("POST", Verb::Foreign),
    ("CONNECT", Verb::Foreign),
    ("HEAD", Verb::Foreign),
];

impl Verb {
    /// The verb called `name`, in any case; `None` where the table has no such name.
    #[must_use]
    pub fn named(name: &[u8]) -> Option<Self> {
        if name.eq_ignore_ascii_case(b"PUT") {
            return Some(Self::Foreign);
        }
        NAMES.iter().find(|(known, _)| name.eq_ignore_ascii_case(known.as_bytes())).map(|&(_, verb)| verb)
    }

    /// The name as RFC 5321 prints it; empty for verbs that have none.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Foreign | Self::Disguised | Self::Unknown => "",
            _ => NAMES.iter().find(|&&(_, verb)| verb == self).map_or("", |&(name, _)| name),
        }
    }

    /// What this verb is to whoever stands between client and server. Elsewhere no verbs are listed, but kinds asked for.
    #[must_use]
    pub fn kind(self) -> Kind {
        match self {
            Self::Ehlo | Self::Helo => Kind::Hello,
            Self::Noop | Self::Rset | Self::Vrfy | Self::Expn | Self::Help | Self::Quit => Kind::Harmless,
            Self::Starttls => Kind::Starttls,
            Self::Mail
            | Self::Rcpt
            | Self::Data
            | Self::Bdat
            | Self::Auth
            | Self::Etrn
            | Self::Turn
            | Self::Atrn
            | Self::Send
            | Self::Soml
            | Self::Saml
            | Self::Burl => Kind::Cutoff,
            Self::Xclient | Self::Xforward => Kind::Claim,
            Self::Foreign => Kind::Foreign,
            Self::Disguised => Kind::Disguised,
            Self::Unknown => Kind::Unknown,
        }
    }

    /// The verbs that end the snooping by default (protocol.md, Snoop 6).
    pub fn default_cutoffs() -> impl Iterator<Item = Self> {
        NAMES.iter().map(|&(_, verb)| verb).filter(|verb| verb.kind() == Kind::Cutoff)
    }

    /// Names the command in `line`, a client's line without its line end (or the part of one that has arrived, up to a
    /// blank). Strict where we serve, loose where we guard.
    #[must_use]
    pub fn of(line: &[u8]) -> Self {
        if looks_like_header(line) {
            return Self::Foreign;
        }
        let strict = Self::named(first_word(line));
        if let Some(verb) = strict {
            return verb;
        }
        match loosely(line) {
            Some(verb) if matches!(verb.kind(), Kind::Cutoff | Kind::Claim) => verb,
            Some(Self::Starttls) => Self::Disguised,
            _ => Self::Unknown,
        }
    }
}

/// What stands behind the verb, blanks on both sides taken off.
#[must_use]
pub fn argument(line: &[u8]) -> &[u8] {
    line[first_word(line).len()..].trim_ascii()
}

/// A TLS record where a command should start: content type 22, handshake (RFC 8446 5.1).
#[must_use]
pub fn is_tls_record(first: u8) -> bool {
    first == 0x16
}

fn is_blank(octet: u8) -> bool {
    octet == b' ' || octet == b'\t'
}

fn first_word(line: &[u8]) -> &[u8] {
    let end = line.iter().position(|&o| is_blank(o)).unwrap_or(line.len());
    &line[..end]
}

/// `Host: x`: a name of letters, digits and hyphens with a colon right behind it. No SMTP verb has one.
fn looks_like_header(line: &[u8]) -> bool {
    let name = line.iter().take_while(|o| o.is_ascii_alphanumeric() || **o == b'-').count();
    name > 0 && line.get(name) == Some(&b':')
}

/// The verb as the most lenient tokeniser would find it: leading white space skipped, quotes and backslashes removed.
fn loosely(line: &[u8]) -> Option<Verb> {
    let mut word = [0u8; 16];
    let mut length = 0;
    for &octet in line.iter().skip_while(|o| o.is_ascii_whitespace() || **o == 0x0b) {
        match octet {
            b'"' | b'\\' => {}
            _ if octet.is_ascii_whitespace() || octet == 0x0b => break,
            _ if length == word.len() => return None,
            _ => {
                word[length] = octet;
                length += 1;
            }
        }
    }
    Verb::named(&word[..length])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_verbs_in_any_case() {
        assert_eq!(Verb::of(b"eHlO a"), Verb::Ehlo);
        assert_eq!(Verb::of(b"sTaRtTlS"), Verb::Starttls);
        assert_eq!(Verb::of(b"MAIL\tFROM:<>"), Verb::Mail);
    }

    #[test]
    fn prefixes_and_extensions_of_verbs_are_unknown() {
        for line in [&b"S"[..], b"STARTTLSX", b"EHL a", b"EHLOX a", b"", b"d", b"LHLO a", b"PROXY TCP4 1.2.3.4"] {
            assert_eq!(Verb::of(line), Verb::Unknown, "{line:?}");
        }
    }

    #[test]
    fn guards_what_a_lenient_server_would_run() {
        assert_eq!(Verb::of(b" MAIL FROM:<>"), Verb::Mail);
        assert_eq!(Verb::of(b"\"MAIL\" FROM:<>"), Verb::Mail);
        assert_eq!(Verb::of(b"M\\AIL FROM:<>"), Verb::Mail);
        assert_eq!(Verb::of(b"\x0b XCLIENT ADDR=1.2.3.4"), Verb::Xclient);
    }

    #[test]
    fn no_verb_is_so_long() {
        for length in [15, 16, 17, 40] {
            assert_eq!(Verb::of(&[&b" "[..], &vec![b'A'; length]].concat()), Verb::Unknown, "{length}");
        }
    }

    #[test]
    fn the_loose_reading_never_serves() {
        assert_eq!(Verb::of(b" STARTTLS"), Verb::Disguised);
        assert_eq!(Verb::of(b"\"EHLO\" a"), Verb::Unknown);
        assert_eq!(Verb::of(b" QUIT"), Verb::Unknown);
    }

    #[test]
    fn knows_other_protocols() {
        for line in [&b"GET / HTTP/1.1"[..], b"POST / x", b"put x", b"HEAD /", b"CONNECT a:1", b"Host: x", b"X-A:b"] {
            assert_eq!(Verb::of(line), Verb::Foreign, "{line:?}");
        }
        assert_eq!(Verb::of(b"MAIL FROM:<a>"), Verb::Mail);
        assert_eq!(Verb::of(b": x"), Verb::Unknown);
    }

    #[test]
    fn blanks_are_no_argument() {
        assert_eq!(argument(b"STARTTLS \t "), b"");
        assert_eq!(argument(b"STARTTLS now "), b"now");
    }
}
