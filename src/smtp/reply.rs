//! Replies: the ones we give, and a scanner that follows the ones a server gives without holding them.

use core::fmt;

/// A reply of our own, whole, with its line end. RFC 2034 wants the enhanced code on all but the greeting and EHLO's.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Ours(&'static str);

macro_rules! replies {
    ($($(#[$doc:meta])* $name:ident = $text:literal;)*) => {
        impl Ours {
            $($(#[$doc])* pub const $name: Self = Self(concat!($text, "\r\n"));)*
        }
    };
}

replies! {
    /// RFC 3207 4: the next octet of the client belongs to TLS.
    READY = "220 2.0.0 Ready to start TLS";
    /// The child is gone or could not be started.
    NOT_AVAILABLE = "421 4.3.0 Mail server not available";
    /// SIGTERM (RFC 5321 3.8).
    SHUTTING_DOWN = "421 4.3.2 Service shutting down";
    /// More sessions than are served at once.
    TOO_MANY_SESSIONS = "421 4.7.0 Too many sessions, try again later";
    /// A limit in time was reached.
    TIMEOUT = "421 4.4.2 Timeout, closing connection";
    /// CVE-2011-0411: something stood behind the STARTTLS line.
    BYTES_AFTER_STARTTLS = "421 4.7.0 Bytes after STARTTLS, closing connection";
    /// One bad line more than is borne.
    TOO_MANY_BAD_LINES = "421 4.7.0 Too many bad lines, closing connection";
    /// One 5yz more than is borne.
    TOO_MANY_ERRORS = "421 4.7.0 Too many errors, closing connection";
    /// STARTTLS once more, when it has failed as often as is borne.
    TOO_MANY_STARTTLS = "421 4.7.0 Too many failed STARTTLS, closing connection";
    /// More sessions from one address than are served at once.
    TOO_MANY_FROM_ADDRESS = "421 4.7.0 Too many sessions from your address, try again later";
    /// More new sessions from one address than are begun in a second.
    TOO_FAST = "421 4.7.0 Too many new sessions from your address, try again later";
    /// Another protocol.
    NOT_SMTP = "421 4.7.0 This is an SMTP server, closing connection";
    /// The secure option's drop.
    TLS_REQUIRED = "421 4.7.0 TLS required, closing connection";
    /// RFC 3207 4: the client decides what to do without.
    TLS_NOT_AVAILABLE = "454 4.7.0 TLS not available";
    /// Over [`super::line::LIMIT`].
    LINE_TOO_LONG = "500 5.5.2 Line too long";
    /// NUL, or a CR that ends no line.
    BAD_OCTET = "500 5.5.2 Bad octet in line";
    /// RFC 3207 4.
    NO_PARAMETER = "501 5.5.4 STARTTLS takes no parameter";
    /// RFC 3207 4.2: inside TLS everything starts anew.
    HELLO_FIRST = "503 5.5.1 Send EHLO first";
    /// RFC 3207 4.
    STARTTLS_FIRST = "530 5.7.0 Must issue a STARTTLS command first";
    /// Only we may say who the client is.
    NOT_FOR_CLIENTS = "550 5.7.0 Not for clients";
}

impl Ours {
    /// Whether it says that the command was wrong.
    #[must_use]
    pub fn is_error(self) -> bool {
        self.0.starts_with('5')
    }

    /// The octets to send.
    #[must_use]
    pub fn octets(self) -> &'static [u8] {
        self.0.as_bytes()
    }
}

impl fmt::Debug for Ours {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.trim_end())
    }
}

/// A reply code as RFC 5321 4.2 allows it: `[2-5][0-5][0-9]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Code([u8; 3]);

impl Code {
    /// The code in the first three octets, or `None` where they are none.
    #[must_use]
    pub fn parse(octets: [u8; 3]) -> Option<Self> {
        let fits = matches!(octets, [b'2'..=b'5', b'0'..=b'5', b'0'..=b'9']);
        fits.then_some(Self(octets))
    }

    /// The first digit: `b'2'` done, `b'3'` go on, `b'4'` not now, `b'5'` no.
    #[must_use]
    pub fn class(self) -> u8 {
        self.0[0]
    }

    /// Whether this is the code written `text`.
    #[must_use]
    pub fn is(self, text: &[u8; 3]) -> bool {
        self.0 == *text
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|&d| write!(f, "{}", char::from(d)))
    }
}

/// What a scanned piece of a reply ended with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scanned {
    /// The octets ran out inside a line.
    Inside,
    /// A line ended and more lines of the same reply follow.
    Line(Code),
    /// The final line ended: the reply is whole.
    Final(Code),
    /// No SMTP: the octet that proves it is included in what was used.
    NotSmtp,
}

/// Follows a server's replies octet by octet, however they are cut; stores four octets of them.
#[derive(Debug, Default)]
pub struct Scanner {
    head: [u8; 4],
    column: usize,
    code: Option<Code>,
    inside_reply: bool,
}

impl Scanner {
    /// Reads up to the end of the present line: how many octets of `octets` belong to it, and what it ended with.
    pub fn scan(&mut self, octets: &[u8]) -> (usize, Scanned) {
        for (at, &octet) in octets.iter().enumerate() {
            if self.column < 4 {
                self.head[self.column] = octet;
                self.column += 1;
                match self.judge_head() {
                    Ok(()) => {}
                    Err(NotSmtp) => {
                        *self = Self::default();
                        return (at + 1, Scanned::NotSmtp);
                    }
                }
            }
            if octet == b'\n' {
                return (at + 1, self.end_line());
            }
            self.inside_reply = true;
        }
        (octets.len(), Scanned::Inside)
    }

    /// Whether the code of the present line has been read, with the octet behind it, or no line has begun.
    #[must_use]
    pub fn is_code_known(&self) -> bool {
        self.column == 0 || self.column == 4
    }

    /// Whether a reply has begun and is not whole.
    #[must_use]
    pub fn is_inside_reply(&self) -> bool {
        self.inside_reply
    }

    fn judge_head(&mut self) -> Result<(), NotSmtp> {
        let fits = match (self.column, &self.head) {
            (1, [first, ..]) => matches!(first, b'2'..=b'5'),
            (2, [_, second, ..]) => matches!(second, b'0'..=b'5'),
            (3, [a, b, c, _]) => {
                self.code = Code::parse([*a, *b, *c]);
                self.code.is_some()
            }
            (_, [_, _, _, fourth]) => matches!(fourth, b' ' | b'-' | b'\r' | b'\n'),
        };
        if fits { Ok(()) } else { Err(NotSmtp) }
    }

    fn end_line(&mut self) -> Scanned {
        let more = self.column == 4 && self.head[3] == b'-';
        let ended = match self.code.take() {
            Some(code) if more => Scanned::Line(code),
            Some(code) => Scanned::Final(code),
            None => Scanned::NotSmtp,
        };
        self.column = 0;
        self.inside_reply = more;
        ended
    }
}

struct NotSmtp;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_says_that_the_command_was_wrong_is_an_error_and_what_ends_or_puts_off_is_none() {
        assert!([Ours::STARTTLS_FIRST, Ours::NOT_FOR_CLIENTS].into_iter().all(Ours::is_error));
        assert!(![Ours::READY, Ours::NOT_AVAILABLE, Ours::TIMEOUT].into_iter().any(Ours::is_error));
    }

    fn ends(input: &[u8], size: usize) -> Vec<Scanned> {
        let (mut scanner, mut seen) = (Scanner::default(), Vec::new());
        for mut piece in input.chunks(size) {
            while !piece.is_empty() {
                let (used, scanned) = scanner.scan(piece);
                if scanned != Scanned::Inside {
                    seen.push(scanned);
                }
                piece = &piece[used..];
            }
        }
        seen
    }

    fn code(text: &[u8; 3]) -> Code {
        Code::parse(*text).unwrap()
    }

    #[test]
    fn follows_replies_however_they_are_cut() {
        let input = b"250-a\r\n250-\r\n250 b\r\n221\r\n354 go\n";
        for size in 1..input.len() {
            let c250 = code(b"250");
            let expected = [
                Scanned::Line(c250),
                Scanned::Line(c250),
                Scanned::Final(c250),
                Scanned::Final(code(b"221")),
                Scanned::Final(code(b"354")),
            ];
            assert_eq!(ends(input, size), expected, "pieces of {size}");
        }
    }

    #[test]
    fn tells_what_is_no_smtp_at_the_first_octet_that_proves_it() {
        assert_eq!(Scanner::default().scan(b"xyz"), (1, Scanned::NotSmtp));
        assert_eq!(Scanner::default().scan(b"150 x\r\n"), (1, Scanned::NotSmtp));
        assert_eq!(Scanner::default().scan(b"260 x\r\n"), (2, Scanned::NotSmtp));
        assert_eq!(Scanner::default().scan(b"250x\r\n"), (4, Scanned::NotSmtp));
        assert_eq!(Scanner::default().scan(b"25\r\n"), (3, Scanned::NotSmtp));
    }

    #[test]
    fn knows_when_a_reply_is_not_whole() {
        let mut scanner = Scanner::default();
        assert!(!scanner.is_inside_reply());
        scanner.scan(b"2");
        assert!(scanner.is_inside_reply());
        scanner.scan(b"50-a\r\n");
        assert!(scanner.is_inside_reply());
        scanner.scan(b"250 b\r\n");
        assert!(!scanner.is_inside_reply());
    }
}
