//! What was typed: argv and environment, split by the table, nothing checked yet but names and arity.
//!
//! Options end at the first word that is none: HOST, or PROG where the way has no HOST. So the way is known by then, and
//! says which words follow. An option typed twice counts with its last value, a typed option counts before its variable,
//! and an empty variable is none. Words are moved from argv, never copied, and only variables of the table are looked up.

use core::net::IpAddr;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use lexopt::{Arg, Parser};

use super::help::{help, help_listen, help_markdown};
use super::options::{COUNT, Id, OPTIONS, OptionSpec};
use crate::error::Fatal;
use crate::session::Way;

/// What the command line asks for.
#[derive(Debug)]
pub enum Request {
    /// Print this on stdout and exit 0.
    Print(String),
    /// Run a session.
    Serve(Box<Typed>),
}

/// A command line whose words are in their places, their meaning still unchecked.
#[derive(Debug)]
pub struct Typed {
    values: [Option<OsString>; COUNT],
    times: [u8; COUNT],
    /// `--listen`, each.
    pub listen: Vec<OsString>,
    /// `--way`.
    pub way: Way,
    /// HOST, where the way has one.
    pub host: Option<OsString>,
    /// PORT, where HOST has one: a UNIX socket has none.
    pub port: Option<OsString>,
    /// PROG.
    pub program: OsString,
    /// ARGS.
    pub arguments: Vec<OsString>,
}

impl Typed {
    /// The value of `id`, typed or from its variable.
    #[must_use]
    pub fn value(&self, id: Id) -> Option<&OsStr> {
        self.values[id as usize].as_deref()
    }

    /// How often `id` was typed; 0 where its value is the variable's. Stops counting at 255.
    #[must_use]
    pub fn times(&self, id: Id) -> u8 {
        self.times[id as usize]
    }
}

/// Splits `words` (argv without the program's name) by the table; `environment` gives a variable's value.
///
/// # Errors
/// [`Fatal::Usage`] for an unknown option, a missing or superfluous value, an empty value, a missing HOST, PORT or PROG.
pub fn split(
    words: impl IntoIterator<Item = OsString>,
    environment: impl Fn(&str) -> Option<OsString>,
) -> Result<Request, Fatal> {
    let mut parser = Parser::from_args(words);
    let mut values = [const { None }; COUNT];
    let mut times = [0u8; COUNT];
    let mut listen = Vec::new();
    let first = loop {
        let spec = match parser.next().map_err(|error| superfluous(&error))? {
            None => break None,
            Some(Arg::Value(word)) => break Some(word),
            Some(Arg::Short(letter)) => {
                OPTIONS.iter().find(|spec| spec.short == Some(letter)).ok_or_else(|| unknown_letter(letter))?
            }
            Some(Arg::Long(name)) => {
                OPTIONS.iter().find(|spec| !name.is_empty() && spec.long == name).ok_or_else(|| unknown_name(name))?
            }
        };
        match spec.id {
            Id::Help => return Ok(Request::Print(help())),
            Id::HelpListen => return Ok(Request::Print(help_listen())),
            Id::HelpMarkdown => return Ok(Request::Print(help_markdown())),
            Id::Version => {
                return Ok(Request::Print(concat!("starttls-wrapper ", env!("CARGO_PKG_VERSION"), "\n").to_owned()));
            }
            _ => {}
        }
        let row = spec.id as usize;
        times[row] = times[row].saturating_add(1);
        if matches!(spec.id, Id::Mute | Id::Lazy) {
            values[row] = parser.optional_value();
        } else if let Some(name) = spec.value {
            let value = parser.value().map_err(|_| Fatal::Usage(format!("{} wants {name}", spec.called())))?;
            if value.is_empty() {
                return Err(Fatal::Usage(format!("{} wants {name}, not nothing", spec.called())));
            }
            if spec.id == Id::Listen {
                listen.push(value);
            } else {
                values[row] = Some(value);
            }
        }
    };
    let way = match (times[Id::Mute as usize], times[Id::Way as usize]) {
        (0, _) => way(values[Id::Way as usize].as_deref())?,
        (_, 0) => Way::Mute,
        _ => return Err(Fatal::Usage("--mute stands behind the TLS of --way raw: leave out --way".to_owned())),
    };
    let mut rest = first.into_iter().chain(parser.raw_args().map_err(|error| superfluous(&error))?);
    let probes = times[Id::Probe as usize] > 0;
    let called = if probes { "--probe".to_owned() } else { called(way) };
    let has_host = way.dials() && !probes;
    let mut next = |what| rest.next().ok_or_else(|| missing(&called, has_host, what));
    let host = if has_host { Some(next("HOST")?) } else { None };
    let has_port = host.as_deref().is_some_and(|host| socket_path(host).is_none());
    let port = if has_port { Some(next("PORT")?) } else { None };
    let has_prog = values[Id::Plain as usize].is_none();
    let program = if has_prog { next("PROG")? } else { OsString::new() };
    let arguments: Vec<OsString> = rest.collect();
    if let (false, Some(word)) = (has_prog, arguments.first()) {
        return Err(Fatal::Usage(format!("--plain stands for PROG: leave out {word:?}, and what follows")));
    }
    if !has_port
        && has_prog
        && let Some(what) = superfluous_words(&called, &program, arguments.first())
    {
        return Err(Fatal::Usage(what));
    }
    for spec in OPTIONS.iter().filter(|spec| spec.value.is_some()) {
        if let (None, Some(name)) = (&values[spec.id as usize], spec.env) {
            values[spec.id as usize] = environment(name).filter(|value| !value.is_empty());
        }
    }
    Ok(Request::Serve(Box::new(Typed { values, times, listen, way, host, port, program, arguments })))
}

fn way(word: Option<&OsStr>) -> Result<Way, Fatal> {
    let Some(word) = word else { return Ok(Way::default()) };
    let named = Way::NAMED.into_iter().find(|way| word == way.name());
    named.ok_or_else(|| {
        let ways = Way::NAMED.map(Way::name).join("|");
        Fatal::Usage(format!("--way takes {ways}, not {word:?}"))
    })
}

/// The path of `unix:PATH`.
pub(super) fn socket_path(host: &OsStr) -> Option<&OsStr> {
    host.as_bytes().strip_prefix(b"unix:").map(OsStr::from_bytes)
}

/// HOST or PORT where the way, or a UNIX socket, has none. PROG is a free word, so this is a rule about looks: a number is
/// a PORT, and an address, `localhost`, `unix:PATH` or a dotted name without a slash is HOST if a number stands behind it.
/// Whoever has a program of such a name calls it `./25`. Other host names are taken for PROG, which then can't be started.
///
/// Rejected: looking whether such a program exists. A usage error must not depend on what is installed.
fn superfluous_words(called: &str, program: &OsStr, next: Option<&OsString>) -> Option<String> {
    let is_number = |word: &OsStr| !word.is_empty() && word.as_bytes().iter().all(u8::is_ascii_digit);
    let is_host = |word: &OsStr| {
        let name = word.to_str().unwrap_or_default();
        let is_dotted = name.contains('.') && !name.contains('/');
        name.parse::<IpAddr>().is_ok() || name.eq_ignore_ascii_case("localhost") || is_dotted
    };
    if socket_path(program).is_some() || next.is_some_and(|next| is_number(next)) && is_host(program) {
        Some(format!("{called} takes no HOST PORT, PROG follows the options, not {program:?}"))
    } else if is_number(program) {
        Some(format!("{called} takes no PORT here, PROG was expected, not {program:?}"))
    } else {
        None
    }
}

fn missing(called: &str, has_host: bool, what: &str) -> Fatal {
    let words = if has_host { "HOST PORT PROG" } else { "PROG" };
    Fatal::Usage(format!("{what} is missing: starttls-wrapper {called} [OPTIONS] {words} [ARGS...]; see --help"))
}

/// The words by which a way is chosen.
pub(super) fn called(way: Way) -> String {
    if way == Way::Mute { "--mute".to_owned() } else { format!("--way {way}") }
}

/// `--flag=value`: the one thing besides unknown names that the splitter itself finds wrong.
fn superfluous(error: &lexopt::Error) -> Fatal {
    match error {
        lexopt::Error::UnexpectedValue { option, .. } => Fatal::Usage(format!("{option} takes no value")),
        other => Fatal::Usage(other.to_string()),
    }
}

fn unknown_letter(letter: char) -> Fatal {
    Fatal::Usage(format!("no option -{}; see --help", letter.escape_default()))
}

fn unknown_name(name: &str) -> Fatal {
    let what = name.escape_default();
    match nearest(name) {
        Some(spec) => Fatal::Usage(format!("no option --{what}; did you mean --{}?", spec.long)),
        None => Fatal::Usage(format!("no option --{what}; see --help")),
    }
}

/// The option that `name` is probably a slip of: at most a third of its letters differ.
fn nearest(name: &str) -> Option<&'static OptionSpec> {
    if name.len() > 64 {
        return None;
    }
    let (spec, distance) = OPTIONS
        .iter()
        .filter(|spec| !spec.long.is_empty())
        .map(|spec| (spec, edits(name.as_bytes(), spec.long.as_bytes())))
        .min_by_key(|&(_, distance)| distance)?;
    (distance * 3 <= spec.long.len()).then_some(spec)
}

/// Levenshtein's distance, in octets.
fn edits(left: &[u8], right: &[u8]) -> usize {
    let mut row: Vec<usize> = (0..=right.len()).collect();
    for (above, octet) in left.iter().enumerate() {
        let mut diagonal = above;
        row[0] = above + 1;
        for (column, other) in right.iter().enumerate() {
            let changed = diagonal + usize::from(octet != other);
            diagonal = row[column + 1];
            row[column + 1] = changed.min(diagonal + 1).min(row[column] + 1);
        }
    }
    row[right.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStringExt;

    fn words(line: &str) -> Vec<OsString> {
        line.split_whitespace().map(OsString::from).collect()
    }

    fn typed(line: &str) -> Typed {
        match split(words(line), |_| None) {
            Ok(Request::Serve(typed)) => *typed,
            other => panic!("{other:?}"),
        }
    }

    fn usage(line: &str) -> String {
        match split(words(line), |_| None) {
            Err(Fatal::Usage(what)) => what,
            other => panic!("{other:?}"),
        }
    }

    fn printed(line: &str) -> String {
        match split(words(line), |_| None) {
            Ok(Request::Print(text)) => text,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn options_end_at_host() {
        let typed = typed("-v localhost 587 qmail-smtpd -v --cert x --help -- y");
        assert_eq!(typed.times(Id::Verbose), 1);
        assert_eq!(typed.value(Id::Cert), None);
        assert_eq!((typed.host, typed.port), (Some("localhost".into()), Some("587".into())));
        assert_eq!(typed.program, "qmail-smtpd");
        assert_eq!(typed.arguments, words("-v --cert x --help -- y"));
    }

    #[test]
    fn a_double_dash_may_stand_before_host() {
        let typed = typed("--require-tls -- -host 587 prog");
        assert_eq!(typed.times(Id::RequireTls), 1);
        assert_eq!(typed.host, Some("-host".into()));
    }

    #[test]
    fn values_stand_behind_a_blank_or_an_equals_sign() {
        assert_eq!(typed("--cert a=b h 1 p").value(Id::Cert), Some(OsStr::new("a=b")));
        assert_eq!(typed("--cert=a=b h 1 p").value(Id::Cert), Some(OsStr::new("a=b")));
        assert_eq!(typed("--cert a --cert=b h 1 p").value(Id::Cert), Some(OsStr::new("b")));
    }

    #[test]
    fn every_long_option_is_parsed() {
        for spec in OPTIONS.iter().filter(|spec| !spec.long.is_empty()) {
            let value = match (spec.id, spec.value) {
                (_, None) => "",
                (Id::Way, _) => "=tls",
                (Id::Plain, _) => continue,
                (_, Some(_)) => "=x",
            };
            match split(words(&format!("--{}{value} h 1 p", spec.long)), |_| None) {
                Ok(Request::Serve(typed)) => assert_eq!(typed.times(spec.id), 1, "{}", spec.long),
                Ok(Request::Print(_)) => {
                    assert!(matches!(spec.id, Id::Help | Id::HelpListen | Id::Version | Id::HelpMarkdown));
                }
                Err(fatal) => panic!("{}: {fatal}", spec.long),
            }
        }
    }

    #[test]
    fn letters_can_be_repeated_and_joined() {
        let typed = typed("-vvq -v --quiet h 1 p");
        assert_eq!((typed.times(Id::Verbose), typed.times(Id::Quiet)), (3, 2));
    }

    #[test]
    fn variables_fill_what_was_not_typed() {
        let environment = |name: &str| Some(OsString::from(format!("env-{name}")));
        let Ok(Request::Serve(typed)) = split(words("--cert typed h 1 p"), environment) else { panic!() };
        assert_eq!(typed.value(Id::Cert), Some(OsStr::new("typed")));
        for (id, name) in [
            (Id::Key, "env-KEYFILE"),
            (Id::BackendCa, "env-CAFILE"),
            (Id::CaDir, "env-CADIR"),
            (Id::TlsUid, "env-TLS_UID"),
            (Id::TlsGid, "env-TLS_GID"),
        ] {
            assert_eq!(typed.value(id), Some(OsStr::new(name)));
            assert_eq!(typed.times(id), 0);
        }
    }

    #[test]
    fn empty_variables_count_as_unset() {
        let Ok(Request::Serve(typed)) = split(words("h 1 p"), |_| Some(OsString::new())) else { panic!() };
        assert!(OPTIONS.iter().all(|spec| typed.value(spec.id).is_none()));
    }

    #[test]
    fn words_of_prog_need_not_be_utf8() {
        let odd = OsString::from_vec(vec![b'p', 0xff]);
        let line = vec!["h".into(), "1".into(), odd.clone(), odd.clone()];
        let Ok(Request::Serve(typed)) = split(line, |_| None) else { panic!() };
        assert_eq!((typed.program, typed.arguments), (odd.clone(), vec![odd]));
    }

    #[test]
    fn missing_words_are_named() {
        assert!(usage("").starts_with("HOST is missing"));
        assert!(usage("--require-tls").starts_with("HOST is missing"));
        assert!(usage("h").starts_with("PORT is missing"));
        assert!(usage("h 1").starts_with("PROG is missing"));
        assert_eq!(usage("--cert"), "--cert wants FILE");
        assert_eq!(usage("--cert= h 1 p"), "--cert wants FILE, not nothing");
        assert_eq!(usage("--require-tls=yes h 1 p"), "--require-tls takes no value");
    }

    #[test]
    fn the_way_says_which_words_follow() {
        let keep = typed("--way keep -v softlimit -m 4000000 smtpd");
        assert_eq!((keep.host, keep.port, keep.program), (None, None, "softlimit".into()));
        assert_eq!(keep.arguments, words("-m 4000000 smtpd"));
        let socket = typed("--way=plain unix:/run/smtp smtpd 25");
        assert_eq!((socket.host, socket.port), (Some("unix:/run/smtp".into()), None));
        assert_eq!((socket.program, socket.arguments), ("smtpd".into(), words("25")));
        let plain = typed("--way plain localhost 25 smtpd");
        assert_eq!((plain.host, plain.port), (Some("localhost".into()), Some("25".into())));
        assert!(usage("--way keep").starts_with("PROG is missing"));
        assert!(usage("--way plain smtpd").starts_with("PORT is missing"));
        assert!(usage("--way plain unix:/run/smtp").starts_with("PROG is missing"));
        assert_eq!(
            usage("--way tsl h 1 p"),
            "--way takes tls|plain|keep|respawn|raw|ucspi-tls|ucspi-tls-respawn, not \"tsl\""
        );
    }

    #[test]
    fn host_and_port_are_refused_where_the_way_has_none() {
        for line in
            ["127.0.0.1 465 p", "::1 25 p", "localhost 25 p", "LOCALHOST 25 p", "mx.example.org 465 p", "unix:/run/x p"]
        {
            assert!(usage(&format!("--way keep {line}")).contains("takes no HOST PORT"), "{line}");
        }
        assert!(usage("--way keep 465 p").contains("takes no PORT"));
        assert!(usage("--way plain unix:/run/x 25 p").contains("takes no PORT"));
        // A program's own arguments are its own business.
        for line in ["timeout 60 smtpd", "./25 p", "./smtp.py 25", "/opt/smtp.py 25 x", "smtp.py x 25", "softlimit 25"]
        {
            assert_eq!(typed(&format!("--way keep {line}")).program, words(line)[0]);
        }
    }

    #[test]
    fn unknown_options_are_named_with_the_nearest_one() {
        assert_eq!(usage("--requiretls h 1 p"), "no option --requiretls; did you mean --require-tls?");
        assert_eq!(usage("--certt=x h 1 p"), "no option --certt; did you mean --cert?");
        assert_eq!(usage("--backend-nam=x h 1 p"), "no option --backend-nam; did you mean --backend-name?");
        assert_eq!(usage("--xyzzy h 1 p"), "no option --xyzzy; see --help");
        assert_eq!(usage("-x h 1 p"), "no option -x; see --help");
        assert_eq!(usage("--=x h 1 p"), "no option --; see --help");
    }

    #[test]
    fn usage_errors_are_one_line_whatever_was_typed() {
        for word in ["--a\nb", "-\n", "--\u{1b}[2J"] {
            let Err(Fatal::Usage(what)) = split([OsString::from(word)], |_| None) else { panic!() };
            assert!(what.chars().all(|c| !c.is_control()), "{what:?}");
        }
    }

    #[test]
    fn help_and_version_need_no_host() {
        assert!(printed("--help").starts_with("Usage: starttls-wrapper [--way tls|plain|raw] [OPTIONS] {HOST PORT | "));
        assert_eq!(printed("-h"), printed("--help"));
        assert!(printed("--help-listen").starts_with("Usage: starttls-wrapper --listen ADDR:PORT "));
        assert_eq!(printed("--version"), concat!("starttls-wrapper ", env!("CARGO_PKG_VERSION"), "\n"));
        assert_eq!(printed("-V"), printed("--version"));
        assert!(printed("--help-markdown").starts_with("| option |"));
    }
}
