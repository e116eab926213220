//! Reads `tests/dialogues/*.txt` (their format: `tests/dialogues/FORMAT.md`) into steps. Knows neither doors nor sessions.
//! Every refusal names the file and the line.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use starttls_wrapper::session::Way;

/// Octets of one repetition.
const MOST: usize = 2 * 1024 * 1024;

/// Who speaks or listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// The remote SMTP client.
    Client,
    /// PROG.
    Child,
    /// The server at HOST PORT.
    Backend,
}

/// What happens when the backend is dialled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backend {
    /// It speaks the B lines.
    Accepts,
    /// Nobody listens.
    Refused,
    /// Its certificate is nobody's.
    Untrusted,
    /// It greets in clear.
    Plaintext,
    /// It accepts the connection and says nothing.
    NoHandshake,
    /// Its TLS stands and it says nothing.
    Silent,
}

/// One step of the script.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Deed {
    /// That side sends one segment.
    Sends(Side, Vec<u8>),
    /// That side must get exactly these octets next.
    Gets(Side, Vec<u8>),
    /// That side ends (inside TLS with close_notify).
    Ends(Side),
    /// The client resets the connection.
    ClientResets,
    /// The backend ends without close_notify.
    BackendDies,
    /// From now on a dial ends so.
    Backend(Backend),
    /// The client does its TLS handshake; what follows is inside.
    ClientTls,
    /// Time passes.
    Waits(Duration),
    /// SIGTERM.
    Terminates,
    /// That side must see the end (inside TLS: close_notify).
    SeesEnd(Side),
    /// That side must see the end without close_notify.
    SeesAbort(Side),
    /// The client must see a TLS alert and the end, in clear.
    ClientSeesAlert,
}

/// A deed and the line of the file where it begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Step {
    pub(crate) line: usize,
    pub(crate) deed: Deed,
}

/// Through which doors a dialogue can run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Doors {
    /// All of them.
    All,
    /// Only the pure session, in simulated time.
    Pure,
    /// Only the program.
    Real,
}

/// One file.
#[derive(Clone, Debug)]
pub(crate) struct Dialogue {
    pub(crate) path: PathBuf,
    /// Through which way it is played.
    pub(crate) way: Way,
    /// The program's other options as typed.
    pub(crate) options: Vec<String>,
    /// Whether a certificate is configured.
    pub(crate) certificate: bool,
    /// What STARTTLS_REPLAY says: for the way `mute`.
    pub(crate) told: String,
    pub(crate) doors: Doors,
    /// Whether the outcome depends on what comes together, so that no segment may be cut.
    pub(crate) whole: bool,
    pub(crate) steps: Vec<Step>,
    /// The exit code and the line that demands it.
    pub(crate) exit: Option<(usize, i32)>,
}

impl Dialogue {
    /// One in which nothing is said yet.
    pub(crate) fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            way: Way::Tls,
            options: Vec::new(),
            certificate: true,
            told: String::new(),
            doors: Doors::All,
            whole: false,
            steps: Vec::new(),
            exit: None,
        }
    }

    /// Reads one line behind the first two, and adds what it says.
    pub(crate) fn read_line(&mut self, number: usize, line: &str) -> Result<(), String> {
        if line.is_empty() || line.starts_with('#') {
            return Ok(());
        }
        if self.exit.is_some() {
            return Err("nothing may follow `= exit`".to_owned());
        }
        if let Some(code) = line.strip_prefix("= exit ") {
            let code = code.parse().map_err(|_| format!("no exit code: {code}"))?;
            self.exit = Some((number, code));
            return Ok(());
        }
        if let Some(event) = line.strip_prefix("! ") {
            let deed = read_event(event)?;
            self.steps.push(Step { line: number, deed });
            return Ok(());
        }
        let (head, rest) = line.split_once(':').ok_or("neither `X: text` nor an event")?;
        let rest = rest.strip_prefix(' ').unwrap_or(rest);
        if head.len() > 1 {
            return read_header(self, head, rest);
        }
        let text = read_text(rest)?;
        let deed = match head {
            "C" => Deed::Sends(Side::Client, text),
            "K" => Deed::Sends(Side::Child, text),
            "B" => Deed::Sends(Side::Backend, text),
            "S" => Deed::Gets(Side::Client, text),
            "k" => Deed::Gets(Side::Child, text),
            "b" => Deed::Gets(Side::Backend, text),
            _ => return Err(format!("nobody is called {head}")),
        };
        if let (Deed::Sends(side, more), Some(Step { deed: Deed::Sends(last, segment), .. })) =
            (&deed, self.steps.last_mut())
            && side == last
        {
            segment.extend_from_slice(more);
            return Ok(());
        }
        self.steps.push(Step { line: number, deed });
        Ok(())
    }

    /// `file:line`, as a compiler would print it, and the way where it is not the usual one.
    pub(crate) fn place(&self, line: usize) -> String {
        let way = if self.way == Way::Tls { String::new() } else { format!(" (way {})", self.way) };
        format!("{}:{line}{way}", self.path.display())
    }
}

/// Why a file can't be read, with its place.
#[derive(Debug)]
pub(crate) struct Malformed(String);

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// All dialogues of this crate, by name; those whose name contains `$DIALOGUE` when that is set.
pub(crate) fn all() -> Result<Vec<Dialogue>, Malformed> {
    let folder = Path::new("tests/dialogues");
    let wanted = std::env::var("DIALOGUE").unwrap_or_default();
    let entries = fs::read_dir(folder).map_err(|e| Malformed(format!("{}: {e}", folder.display())))?;
    let mut paths: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "txt"))
        .filter(|path| path.file_stem().is_some_and(|name| name.to_string_lossy().contains(&wanted)))
        .collect();
    paths.sort();
    paths.iter().map(|path| read(path)).collect()
}

/// Reads one file.
pub(crate) fn read(path: &Path) -> Result<Dialogue, Malformed> {
    let text = fs::read_to_string(path).map_err(|e| Malformed(format!("{}: {e}", path.display())))?;
    parse(path, &text)
}

/// Reads the text of one file; `path` is only for the messages.
pub(crate) fn parse(path: &Path, text: &str) -> Result<Dialogue, Malformed> {
    let mut dialogue = Dialogue::new(path);
    for (at, line) in text.lines().enumerate() {
        let number = at + 1;
        let read = match number {
            1 => line.strip_prefix("# ").map(|_| ()).ok_or_else(|| "the first line is `# <claim>`".to_owned()),
            2 => line.strip_prefix("# source: ").map(|_| ()).ok_or_else(|| "the second is `# source: ...`".to_owned()),
            _ => dialogue.read_line(number, line),
        };
        read.map_err(|why| Malformed(format!("{}: {why}", dialogue.place(number))))?;
    }
    if dialogue.steps.is_empty() {
        return Err(Malformed(format!("{}: no script", path.display())));
    }
    Ok(dialogue)
}

fn read_header(dialogue: &mut Dialogue, head: &str, rest: &str) -> Result<(), String> {
    if !dialogue.steps.is_empty() {
        return Err(format!("the header `{head}` comes too late"));
    }
    match (head, rest) {
        ("options", _) => dialogue.options = rest.split_whitespace().map(str::to_owned).collect(),
        ("way", _) => {
            let named = Way::EVERY.into_iter().find(|way| way.name() == rest);
            dialogue.way = named.ok_or_else(|| format!("no such way: {rest}"))?;
        }
        ("cert", "none") => dialogue.certificate = false,
        ("doors", "pure") => dialogue.doors = Doors::Pure,
        ("segments", "whole") => dialogue.whole = true,
        ("doors", "real") => dialogue.doors = Doors::Real,
        _ => return Err(format!("no such header: {head}: {rest}")),
    }
    Ok(())
}

fn read_event(event: &str) -> Result<Deed, String> {
    if let Some(seconds) = event.strip_prefix("wait ") {
        return Ok(Deed::Waits(Duration::from_secs(seconds.parse().map_err(|_| format!("no seconds: {seconds}"))?)));
    }
    Ok(match event {
        "client-eof" => Deed::Ends(Side::Client),
        "child-eof" => Deed::Ends(Side::Child),
        "backend-eof" => Deed::Ends(Side::Backend),
        "client-reset" => Deed::ClientResets,
        "backend-dies" => Deed::BackendDies,
        "backend accepts" => Deed::Backend(Backend::Accepts),
        "backend refused" => Deed::Backend(Backend::Refused),
        "backend untrusted" => Deed::Backend(Backend::Untrusted),
        "backend plaintext" => Deed::Backend(Backend::Plaintext),
        "backend no-handshake" => Deed::Backend(Backend::NoHandshake),
        "backend silent" => Deed::Backend(Backend::Silent),
        "client-tls" => Deed::ClientTls,
        "terminate" => Deed::Terminates,
        "s-eof" => Deed::SeesEnd(Side::Client),
        "k-eof" => Deed::SeesEnd(Side::Child),
        "b-eof" => Deed::SeesEnd(Side::Backend),
        "s-abort" => Deed::SeesAbort(Side::Client),
        "b-abort" => Deed::SeesAbort(Side::Backend),
        "s-alert" => Deed::ClientSeesAlert,
        _ => return Err(format!("no such event: {event}")),
    })
}

/// The octets of `text`, with its CRLF unless it ends in `\c`.
fn read_text(text: &str) -> Result<Vec<u8>, String> {
    let (text, line_end) = match text.strip_suffix("\\c") {
        // `\\c` is a backslash and a c.
        Some(before) if before.bytes().rev().take_while(|&o| o == b'\\').count() % 2 == 0 => (before, &b""[..]),
        _ => (text, &b"\r\n"[..]),
    };
    let mut octets = unescape(text)?;
    octets.extend_from_slice(line_end);
    Ok(octets)
}

fn unescape(text: &str) -> Result<Vec<u8>, String> {
    let mut octets = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        octets.extend_from_slice(&rest.as_bytes()[..at]);
        let escape = &rest[at + 1..];
        let kind = escape.chars().next().ok_or("a backslash at the end")?;
        rest = &escape[kind.len_utf8()..];
        match kind {
            'r' => octets.push(b'\r'),
            'n' => octets.push(b'\n'),
            '0' => octets.push(0),
            't' => octets.push(b'\t'),
            '\\' => octets.push(b'\\'),
            'x' => {
                let hex = rest.get(..2).ok_or("\\x needs two digits")?;
                octets.push(u8::from_str_radix(hex, 16).map_err(|_| format!("no hex: {hex}"))?);
                rest = &rest[2..];
            }
            '*' => {
                let (count, tail) = rest.split_once('{').ok_or("\\*N{x} needs its brace")?;
                let (what, tail) = tail.split_once('}').ok_or("\\*N{x} needs its closing brace")?;
                let count: usize = count.parse().map_err(|_| format!("no count: {count}"))?;
                let unit = unescape(what)?;
                if count > MOST / unit.len().max(1) {
                    return Err(format!("more than {MOST} octets"));
                }
                octets.extend(unit.repeat(count));
                rest = tail;
            }
            _ => return Err(format!("no such escape: \\{kind}")),
        }
    }
    octets.extend_from_slice(rest.as_bytes());
    Ok(octets)
}
