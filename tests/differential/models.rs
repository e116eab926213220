//! How qmail, Postfix, Exim and mailfront cut a stream into commands and name them (security.md 2.2), each more lenient than it is where
//! its versions differ. Independent of src/smtp: nothing of it is used here. tests/real/readings.rs holds them against the servers.

/// What a server makes of one line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Command {
    /// In upper case, as far as ASCII goes.
    pub(crate) verb: Vec<u8>,
    /// Where it begins: at the start of a line, or behind where the server cuts one that is too long.
    pub(crate) at: usize,
}

/// A server's reading of lines.
pub(crate) type Model = fn(&[u8]) -> Vec<Command>;

pub(crate) const MODELS: [(&str, Model); 4] =
    [("qmail", qmail), ("postfix", postfix), ("exim", exim), ("mailfront", mailfront)];

/// What must never be run behind the snooper's back.
pub(crate) const GUARDED: [&[u8]; 9] =
    [b"MAIL", b"AUTH", b"DATA", b"BDAT", b"STARTTLS", b"RCPT", b"ETRN", b"XCLIENT", b"XFORWARD"];

/// Whether a server of this model knows the verb, and answers 2yz.
pub(crate) fn knows(verb: &[u8]) -> bool {
    let harmless: [&[u8]; 8] = [b"EHLO", b"HELO", b"NOOP", b"RSET", b"VRFY", b"EXPN", b"HELP", b"QUIT"];
    harmless.contains(&verb) || GUARDED.contains(&verb)
}

/// All lines end at LF, whatever stands before it; what follows the last LF is not among them.
fn lines(stream: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    let mut at = 0;
    stream.split_inclusive(|octet| *octet == b'\n').filter_map(move |line| {
        let start = at;
        at += line.len();
        line.strip_suffix(b"\n").map(|line| (start, line))
    })
}

/// notqmail's commands.c: one CR goes; the line is a C string; the verb ends at the first space.
pub(crate) fn qmail(stream: &[u8]) -> Vec<Command> {
    let command = |(at, line): (usize, &[u8])| {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let verb = line.split(|octet| matches!(octet, 0 | b' ')).next().unwrap_or_default();
        Command { verb: verb.to_ascii_uppercase(), at }
    };
    lines(stream).map(command).collect()
}

/// Postfix's smtp_get and smtpd_token: 2048 octets, the rest is skipped; all CRs at the end go (older ones); a C string; leading white
/// space goes; quotes and backslashes are taken out. Both readings of a backslash count.
pub(crate) fn postfix(stream: &[u8]) -> Vec<Command> {
    let mut commands = Vec::new();
    for (at, line) in lines(stream) {
        let line = &line[..line.len().min(2048)];
        let end = line.iter().rposition(|octet| *octet != b'\r').map_or(0, |last| last + 1);
        let line = line[..end].split(|octet| *octet == 0).next().unwrap_or_default();
        for literal in [true, false] {
            commands.push(Command { verb: postfix_token(line, literal), at });
        }
    }
    commands
}

/// The first token. `literal`: an octet behind a backslash, or inside quotes, stands for itself even if it is a blank.
fn postfix_token(line: &[u8], literal: bool) -> Vec<u8> {
    let is_space = |octet: &u8| matches!(octet, b' ' | 0x09..=0x0d);
    let mut rest = line.iter().skip_while(|octet| is_space(octet));
    let (mut token, mut quoted) = (Vec::new(), false);
    while let Some(octet) = rest.next() {
        match octet {
            b'"' => quoted = !quoted,
            b'\\' if literal => token.extend(rest.next()),
            b'\\' => {}
            space if is_space(space) && !(quoted && literal) => break,
            other => token.push(*other),
        }
    }
    token.to_ascii_uppercase()
}

/// Exim's smtp_read_command: 16,385 octets without an LF are refused, and what follows them is a new command; a line with a NUL is refused;
/// all white space at the end goes; a command is a prefix with a space or the end behind it, MAIL and RCPT by their first word at least.
pub(crate) fn exim(stream: &[u8]) -> Vec<Command> {
    const TOO_LONG: usize = 16_385;
    let is_space = |octet: &u8| matches!(octet, b' ' | 0x09..=0x0d);
    let mut commands = Vec::new();
    for (start, line) in lines(stream) {
        for (number, part) in line.chunks(TOO_LONG).enumerate() {
            let part = if part.len() == TOO_LONG || part.contains(&0) { &[] } else { part };
            let end = part.iter().rposition(|octet| !is_space(octet)).map_or(0, |last| last + 1);
            let verb = part[..end].split(|octet| *octet == b' ').next().unwrap_or_default();
            commands.push(Command { verb: verb.to_ascii_uppercase(), at: start + number * TOO_LONG });
        }
    }
    commands
}

/// mailfront's parse_line: as qmail's, and a tab ends the verb too. What has no LF when its input ends is run all the same, its last octet
/// taken for one.
pub(crate) fn mailfront(stream: &[u8]) -> Vec<Command> {
    let command = |(at, line): (usize, &[u8])| {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let verb = line.split(|octet| matches!(octet, 0 | b' ' | b'\t')).next().unwrap_or_default();
        Command { verb: verb.to_ascii_uppercase(), at }
    };
    let end = stream.iter().rposition(|octet| *octet == b'\n').map_or(0, |lf| lf + 1);
    let unfinished = stream[end..].split_last().map(|(_, line)| (end, line));
    lines(stream).chain(unfinished).map(command).collect()
}
