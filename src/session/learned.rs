//! What one probing session has learned of a plaintext server: its replies, as templates, so that others can give them.
//!
//! A reply may echo what the client called itself, and the client's address; all else must be the same for everybody. Whether it is,
//! a second probe shows, of another name and address ([`Learned::agrees`]). Line ends are CRLF here, whatever the server's were.
//!
//! As text, for a file: a line for each line of a reply, its command before it; `%h` is the client's name, `%a` its address, `%%` a
//! percent sign, and `%` with two digits (hexadecimal, capitals) an octet that can't be printed.

use core::fmt;
use core::net::IpAddr;

use crate::smtp::command::Verb;
use crate::smtp::reply::Code;

/// What is learned: the greeting, and what each of these commands is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// Nothing yet.
    Greeting,
    /// EHLO with a name.
    Ehlo,
    /// HELO with a name.
    Helo,
    /// NOOP alone.
    Noop,
    /// RSET alone.
    Rset,
    /// QUIT alone.
    Quit,
}

impl Asked {
    /// All, in the order of a probe.
    pub const ALL: [Self; 6] = [Self::Greeting, Self::Ehlo, Self::Noop, Self::Rset, Self::Helo, Self::Quit];

    /// The one that a client's command is, if it can be learned.
    pub(super) fn by(verb: Verb) -> Option<Self> {
        match verb {
            Verb::Ehlo => Some(Self::Ehlo),
            Verb::Helo => Some(Self::Helo),
            Verb::Noop => Some(Self::Noop),
            Verb::Rset => Some(Self::Rset),
            Verb::Quit => Some(Self::Quit),
            _ => None,
        }
    }

    /// What a probe that calls itself `name` says; `None`: it only listens.
    #[must_use]
    pub fn line(self, name: &str) -> Option<String> {
        match self {
            Self::Greeting => None,
            Self::Ehlo | Self::Helo => Some(format!("{} {name}", self.word().to_uppercase())),
            Self::Noop | Self::Rset | Self::Quit => Some(self.word().to_uppercase()),
        }
    }

    /// What it is called in a file and in the log.
    fn word(self) -> &'static str {
        match self {
            Self::Greeting => "greeting",
            Self::Ehlo => "ehlo",
            Self::Helo => "helo",
            Self::Noop => "noop",
            Self::Rset => "rset",
            Self::Quit => "quit",
        }
    }
}

/// Who a probe said that it was.
#[derive(Clone, Copy, Debug)]
pub struct Prober<'a> {
    /// What it said in EHLO.
    pub name: &'a str,
    /// Where it came from, as far as the server was told.
    pub address: Option<IpAddr>,
}

/// What a probe has heard.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Heard([Vec<u8>; Asked::ALL.len()]);

impl Heard {
    /// Takes down a whole reply.
    pub fn note(&mut self, asked: Asked, reply: &[u8]) {
        let lines = reply.split_inclusive(|octet| *octet == b'\n');
        let texts = lines.map(|line| line.strip_suffix(b"\n").unwrap_or(line));
        let bare = texts.map(|line| line.strip_suffix(b"\r").unwrap_or(line));
        self.0[asked as usize] = bare.flat_map(|line| [line, b"\r\n"].concat()).collect();
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Text(Vec<u8>),
    Name,
    Address,
}

/// The replies of a server. One that did not take a command has none for it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Learned([Vec<Piece>; Asked::ALL.len()]);

impl Learned {
    /// Learns from one probe.
    ///
    /// # Errors
    /// Its greeting was not 220: there is nobody to answer for.
    pub fn from_probe(heard: &Heard, prober: Prober<'_>) -> Result<Self, String> {
        let mut learned = Self::default();
        for asked in Asked::ALL {
            let reply = &heard.0[asked as usize];
            let code = code_of(reply);
            match (asked, code) {
                (Asked::Greeting, Some(code)) if !code.is(b"220") => return Err(format!("it greeted with {code}")),
                (Asked::Greeting, None) => return Err("it did not greet".to_owned()),
                // Nobody has said a name yet.
                (Asked::Greeting, Some(_)) => {
                    learned.0[asked as usize] = template(reply, Prober { name: "", ..prober });
                }
                (_, Some(code)) if code.class() == b'2' => learned.0[asked as usize] = template(reply, prober),
                (_, Some(_) | None) => {}
            }
        }
        Ok(learned)
    }

    /// Whether another probe has learned the same.
    ///
    /// # Errors
    /// Which reply differs.
    pub fn agrees(&self, other: &Self) -> Result<(), String> {
        match Asked::ALL.into_iter().find(|asked| self.0[*asked as usize] != other.0[*asked as usize]) {
            Some(asked) => Err(format!("its reply to {} is not always the same", asked.word())),
            None => Ok(()),
        }
    }

    /// Whether a probe has heard all that this one says; what it says nothing of is the server's own affair.
    ///
    /// # Errors
    /// Which reply differs.
    pub fn is_true_of(&self, heard: &Heard, prober: Prober<'_>) -> Result<(), String> {
        let other = Self::from_probe(heard, prober)?;
        let differs = |asked: &Asked| self.knows(*asked) && self.0[*asked as usize] != other.0[*asked as usize];
        match Asked::ALL.into_iter().find(differs) {
            Some(asked) => Err(format!("its reply to {} is another", asked.word())),
            None => Ok(()),
        }
    }

    /// Whether something is learned for it.
    #[must_use]
    pub fn knows(&self, asked: Asked) -> bool {
        !self.0[asked as usize].is_empty()
    }

    /// Whether the reply to it tells the client its name, which then must have been said.
    pub(super) fn names_client(&self, asked: Asked) -> bool {
        self.0[asked as usize].contains(&Piece::Name)
    }

    /// Whether a reply tells the client its address, which then must be known.
    #[must_use]
    pub fn names_address(&self) -> bool {
        self.0.iter().flatten().any(|piece| *piece == Piece::Address)
    }

    /// The reply to a client of this name and address.
    pub(super) fn say(&self, asked: Asked, name: &[u8], address: Option<IpAddr>, out: &mut Vec<u8>) {
        for piece in &self.0[asked as usize] {
            match piece {
                Piece::Text(text) => out.extend_from_slice(text),
                Piece::Name => out.extend_from_slice(name),
                Piece::Address => {
                    out.extend_from_slice(address.map(|known| known.to_string()).unwrap_or_default().as_bytes());
                }
            }
        }
    }

    /// Reads the text that [`Learned`] is displayed as.
    ///
    /// # Errors
    /// What is wrong, and in which line.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut learned = Self::default();
        for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.is_empty() && !line.starts_with('#')) {
            let wrong = |what: &str| format!("line {}: {what}", number + 1);
            let (word, rest) = line.split_once(' ').ok_or_else(|| wrong("no reply"))?;
            let known = Asked::ALL.into_iter().find(|asked| asked.word() == word);
            let asked = known.ok_or_else(|| wrong("neither greeting nor a command that can be learned"))?;
            let pieces = &mut learned.0[asked as usize];
            let what = "a % that is followed by neither h, a, % nor two digits";
            unescape(rest, pieces).ok_or_else(|| wrong(what))?;
            push_text(pieces, b"\r\n");
        }
        for asked in Asked::ALL.into_iter().filter(|asked| learned.knows(*asked)) {
            let wanted = if asked == Asked::Greeting { "220" } else { "2yz" };
            let mut reply = Vec::new();
            learned.say(asked, b"name", None, &mut reply);
            if !is_whole(&reply, wanted == "220") {
                return Err(format!("{}: not one whole reply of code {wanted}", asked.word()));
            }
        }
        if learned.names_client(Asked::Greeting) {
            return Err("greeting: no name is known yet".to_owned());
        }
        if learned.knows(Asked::Greeting) { Ok(learned) } else { Err("no greeting".to_owned()) }
    }
}

/// Its text; see [`Learned::parse`].
impl fmt::Display for Learned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for asked in Asked::ALL {
            let mut line = String::new();
            for piece in &self.0[asked as usize] {
                match piece {
                    Piece::Name => line.push_str("%h"),
                    Piece::Address => line.push_str("%a"),
                    Piece::Text(text) => text.iter().enumerate().for_each(|(at, octet)| match octet {
                        b'%' => line.push_str("%%"),
                        b'\r' if text.get(at + 1) == Some(&b'\n') => {}
                        b'\n' | b' '..=b'~' => line.push(char::from(*octet)),
                        other => line.push_str(&format!("%{other:02X}")),
                    }),
                }
            }
            for line in line.lines() {
                writeln!(f, "{} {line}", asked.word())?;
            }
        }
        Ok(())
    }
}

/// The code of a reply is that of its last line.
fn code_of(reply: &[u8]) -> Option<Code> {
    let last = reply.trim_ascii_end().rsplit(|octet| *octet == b'\n').next()?;
    Code::parse(*last.first_chunk()?)
}

fn template(reply: &[u8], prober: Prober<'_>) -> Vec<Piece> {
    let address = prober.address.map(|known| known.to_string());
    let marks = [(prober.name, Piece::Name), (address.as_deref().unwrap_or_default(), Piece::Address)];
    let (mut pieces, mut rest) = (Vec::new(), reply);
    while let Some(octet) = rest.first() {
        match marks.iter().find(|(mark, _)| !mark.is_empty() && rest.starts_with(mark.as_bytes())) {
            Some((mark, piece)) => {
                pieces.push(piece.clone());
                rest = &rest[mark.len()..];
            }
            None => {
                push_text(&mut pieces, &[*octet]);
                rest = &rest[1..];
            }
        }
    }
    pieces
}

fn push_text(pieces: &mut Vec<Piece>, octets: &[u8]) {
    match pieces.last_mut() {
        Some(Piece::Text(text)) => text.extend_from_slice(octets),
        _ => pieces.push(Piece::Text(octets.to_vec())),
    }
}

fn unescape(line: &str, pieces: &mut Vec<Piece>) -> Option<()> {
    let mut rest = line.as_bytes();
    while let Some((octet, behind)) = rest.split_first() {
        rest = behind;
        if *octet != b'%' {
            push_text(pieces, &[*octet]);
            continue;
        }
        let mark = *rest.first()?;
        let length = if matches!(mark, b'h' | b'a' | b'%') { 1 } else { 2 };
        match mark {
            b'h' => pieces.push(Piece::Name),
            // Digits are capitals here: %A9 is an octet.
            b'a' => pieces.push(Piece::Address),
            b'%' => push_text(pieces, b"%"),
            _ => {
                let digits = core::str::from_utf8(rest.get(..2)?).ok()?;
                push_text(pieces, &[u8::from_str_radix(digits, 16).ok().filter(|octet| *octet != b'\n')?]);
            }
        }
        rest = &rest[length..];
    }
    Some(())
}

/// Whether these lines are one reply, and a good one.
fn is_whole(reply: &[u8], is_greeting: bool) -> bool {
    let mut scanner = crate::smtp::reply::Scanner::default();
    let mut rest = reply;
    while !rest.is_empty() {
        let (used, scanned) = scanner.scan(rest);
        rest = &rest[used..];
        match scanned {
            crate::smtp::reply::Scanned::Final(code) => {
                return rest.is_empty() && if is_greeting { code.is(b"220") } else { code.class() == b'2' };
            }
            crate::smtp::reply::Scanned::NotSmtp => return false,
            crate::smtp::reply::Scanned::Inside | crate::smtp::reply::Scanned::Line(_) => {}
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: Prober<'_> =
        Prober { name: "probe-1.invalid", address: Some(IpAddr::V4(core::net::Ipv4Addr::new(192, 0, 2, 25))) };
    const SECOND: Prober<'_> =
        Prober { name: "probe-2.invalid", address: Some(IpAddr::V4(core::net::Ipv4Addr::new(198, 51, 100, 7))) };

    fn heard(replies: &[(Asked, &str)]) -> Heard {
        let mut heard = Heard::default();
        replies.iter().for_each(|(asked, reply)| heard.note(*asked, reply.as_bytes()));
        heard
    }

    fn exim(prober: Prober<'_>, greeting: &str) -> Heard {
        let address = prober.address.unwrap();
        let ehlo = format!("250-mx Hello {} [{address}]\n250-SIZE 5\r\n250 HELP 100% \u{fc}\r\n", prober.name);
        heard(&[
            (Asked::Greeting, greeting),
            (Asked::Ehlo, &ehlo),
            (Asked::Noop, "250 OK\r\n"),
            (Asked::Quit, "221 mx\r\n"),
        ])
    }

    fn said(learned: &Learned, asked: Asked) -> String {
        let mut out = Vec::new();
        learned.say(asked, b"c", Some("2001:db8::1".parse().unwrap()), &mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn name_and_address_are_the_clients_own() {
        let learned = Learned::from_probe(&exim(FIRST, "220 mx\r\n"), FIRST).unwrap();
        assert_eq!(
            said(&learned, Asked::Ehlo),
            "250-mx Hello c [2001:db8::1]\r\n250-SIZE 5\r\n250 HELP 100% \u{fc}\r\n"
        );
        assert!(learned.names_address() && learned.knows(Asked::Noop) && !learned.knows(Asked::Rset));
        assert_eq!(learned.agrees(&Learned::from_probe(&exim(SECOND, "220 mx\r\n"), SECOND).unwrap()), Ok(()));
    }

    #[test]
    fn a_probe_says_each_command_and_nothing_before_the_greeting() {
        let lines = Asked::ALL.map(|asked| asked.line("p.invalid").unwrap_or_default());
        assert_eq!(lines, ["", "EHLO p.invalid", "NOOP", "RSET", "HELO p.invalid", "QUIT"]);
        assert_eq!(Asked::Greeting.line("p.invalid"), None);
    }

    #[test]
    fn a_greeting_names_no_client() {
        let greeting = "220 probe-1.invalid, or so\r\n";
        let learned = Learned::from_probe(&heard(&[(Asked::Greeting, greeting)]), FIRST).unwrap();
        assert_eq!(said(&learned, Asked::Greeting), greeting);
    }

    #[test]
    fn what_is_refused_is_not_learned() {
        let replies = [
            (Asked::Greeting, "220 mx\r\n"),
            (Asked::Ehlo, "502 no\r\n"),
            (Asked::Helo, "250 mx\r\n"),
            (Asked::Noop, "354 go on\r\n"),
            (Asked::Rset, "421 later\r\n"),
        ];
        let learned = Learned::from_probe(&heard(&replies), FIRST).unwrap();
        assert_eq!(Asked::ALL.map(|asked| learned.knows(asked)), [true, false, false, false, true, false]);
    }

    #[test]
    fn what_differs_between_two_probes_is_named() {
        let learned = Learned::from_probe(&exim(FIRST, "220 mx 08:53:59\r\n"), FIRST).unwrap();
        let other = |heard: &Heard| Learned::from_probe(heard, SECOND).unwrap();
        let why = learned.agrees(&other(&exim(SECOND, "220 mx 08:54:01\r\n")));
        assert_eq!(why, Err("its reply to greeting is not always the same".to_owned()));
        let mut less = exim(SECOND, "220 mx 08:53:59\r\n");
        less.note(Asked::Noop, b"502 no\r\n");
        assert_eq!(learned.agrees(&other(&less)), Err("its reply to noop is not always the same".to_owned()));
        assert_eq!(learned.is_true_of(&less, SECOND), Err("its reply to noop is another".to_owned()));
    }

    #[test]
    fn what_is_not_said_of_a_server_can_not_be_wrong() {
        let learned = Learned::parse("greeting 220 mx\nnoop 250 OK\n").unwrap();
        assert_eq!(learned.is_true_of(&exim(FIRST, "220 mx\n"), FIRST), Ok(()));
        let mut other = exim(FIRST, "220 mx\n");
        other.note(Asked::Noop, b"250 ok\n");
        assert_eq!(learned.is_true_of(&other, FIRST), Err("its reply to noop is another".to_owned()));
        assert!(learned.is_true_of(&heard(&[]), FIRST).is_err());
    }

    #[test]
    fn nothing_is_learned_of_one_that_does_not_serve() {
        for (greeting, why) in [
            ("554 no\r\n", "it greeted with 554"),
            ("220-mx\r\n554 no\r\n", "it greeted with 554"),
            ("", "it did not greet"),
        ] {
            assert_eq!(Learned::from_probe(&heard(&[(Asked::Greeting, greeting)]), FIRST), Err(why.to_owned()));
        }
    }

    #[test]
    fn the_text_is_read_as_it_was_written() {
        let learned = Learned::from_probe(&exim(FIRST, "220-mx\r\n220 it's me\r\n"), FIRST).unwrap();
        let text = learned.to_string();
        assert!(text.starts_with("greeting 220-mx\ngreeting 220 it's me\nehlo 250-mx Hello %h [%a]\n"), "{text}");
        assert!(text.contains("ehlo 250 HELP 100%% %C3%BC\n"), "{text}");
        assert_eq!(Learned::parse(&format!("# of today\n\n{text}")), Ok(learned));
    }

    /// An octet whose digits begin with an a is no address, and a CR inside a line is not its end.
    #[test]
    fn the_text_has_every_octet() {
        let odd: Vec<u8> = (0..=255).filter(|octet| *octet != b'\n').collect();
        let mut said = heard(&[]);
        said.note(Asked::Greeting, &[b"220 ", &odd[..], b"\n"].concat());
        let learned = Learned::from_probe(&said, FIRST).unwrap();
        assert_eq!(Learned::parse(&learned.to_string()), Ok(learned));
    }

    #[test]
    fn a_text_that_is_no_such_is_refused() {
        for (text, why) in [
            ("", "no greeting"),
            ("greeting", "line 1: no reply"),
            ("mail 250 ok", "line 1: neither greeting nor a command that can be learned"),
            ("greeting 220 %x", "line 1: a % that is followed by neither h, a, % nor two digits"),
            ("greeting 220 %0d%0a", "line 1: a % that is followed by neither h, a, % nor two digits"),
            ("greeting 220-mx", "greeting: not one whole reply of code 220"),
            ("greeting 220 mx greets %h", "greeting: no name is known yet"),
            ("greeting 554 no", "greeting: not one whole reply of code 220"),
            ("greeting 220 mx\nehlo 250 a\nehlo 250 b", "ehlo: not one whole reply of code 2yz"),
        ] {
            assert_eq!(Learned::parse(text), Err(why.to_owned()), "{text:?}");
        }
    }
}
