//! Lines on stderr: `starttls-wrapper[PID]: level: message`, without the level where it is `info`, in one write each.
//!
//! No time stamp (the supervisor's logger adds it), no colour. One record is one line, whatever it quotes.

use core::fmt::{self, Write as _};
use std::io::Write as _;

use env_filter::Filter;
use log::{Level, LevelFilter, Log, Metadata, Record, error, warn};

/// Starts the logging at `level`; RUST_LOG, where it is set, says otherwise. A second call changes nothing.
///
/// The process id in the lines is that of the caller. From here on a panic is one line too, unless RUST_BACKTRACE asks for more.
pub fn init(level: LevelFilter) {
    let mut filters = env_filter::Builder::new();
    filters.filter_level(level);
    let typed = std::env::var_os("RUST_LOG").filter(|typed| !typed.is_empty());
    let refused = typed.and_then(|typed| filters.try_parse(&typed.to_string_lossy()).err());
    let filter = filters.build();
    let most = filter.filter();
    // Only fails where a logger stands already, which then goes on.
    if log::set_boxed_logger(Box::new(Stderr { filter, pid: std::process::id() })).is_err() {
        return;
    }
    log::set_max_level(most);
    if let Some(why) = refused {
        // PROG may be its real addressee, with a grammar of its own: no reason to refuse service.
        warn!("RUST_LOG is ignored: {why}");
    }
    if std::env::var_os("RUST_BACKTRACE").is_none() {
        std::panic::set_hook(Box::new(|panic| error!("bug: {}", panic.to_string().replace('\n', " "))));
    }
}

/// The one logger.
struct Stderr {
    filter: Filter,
    pid: u32,
}

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.filter.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        if self.filter.matches(record) {
            let line = Line { pid: self.pid, level: record.level(), message: record.args() }.to_string();
            // Nobody is left to be told if it fails.
            let _ = std::io::stderr().write_all(line.as_bytes());
        }
    }

    fn flush(&self) {}
}

/// One record as it is printed, its line end included.
struct Line<'a> {
    pid: u32,
    level: Level,
    message: &'a fmt::Arguments<'a>,
}

impl fmt::Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "starttls-wrapper[{}]: {}", self.pid, level_word(self.level))?;
        OneLine(f).write_fmt(*self.message)?;
        f.write_char('\n')
    }
}

fn level_word(level: Level) -> &'static str {
    match level {
        Level::Error => "error: ",
        Level::Warn => "warning: ",
        Level::Info => "",
        Level::Debug => "debug: ",
        Level::Trace => "trace: ",
    }
}

/// The second fence behind [`escape`]: no control character of a library's message makes a line of its own.
struct OneLine<'a, 'b>(&'a mut fmt::Formatter<'b>);

impl fmt::Write for OneLine<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for clean in text.split_inclusive(char::is_control) {
            match clean.chars().next_back() {
                Some(last) if last.is_control() => {
                    self.0.write_str(&clean[..clean.len() - last.len_utf8()])?;
                    write!(self.0, "\\x{:02x}", u32::from(last))?;
                }
                _ => self.0.write_str(clean)?,
            }
        }
        Ok(())
    }
}

/// What a remote party sent, fit for a log line: printable ASCII as it is, a backslash doubled, every other octet as
/// `\xHH`. Takes the first `max` octets; where there are more, `...` follows them.
pub fn escape(bytes: &[u8], max: usize) -> impl fmt::Display + '_ {
    Escaped { shown: &bytes[..bytes.len().min(max)], is_cut: bytes.len() > max }
}

struct Escaped<'a> {
    shown: &'a [u8],
    is_cut: bool,
}

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for &octet in self.shown {
            match octet {
                b'\\' => f.write_str("\\\\")?,
                b' '..=b'~' => f.write_char(char::from(octet))?,
                _ => write!(f, "\\x{octet:02x}")?,
            }
        }
        if self.is_cut { f.write_str("...") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(level: Level, message: fmt::Arguments<'_>) -> String {
        Line { pid: 42, level, message: &message }.to_string()
    }

    #[test]
    fn lines_name_program_pid_and_level_but_for_info() {
        assert_eq!(line(Level::Info, format_args!("a {}", 1)), "starttls-wrapper[42]: a 1\n");
        assert_eq!(line(Level::Warn, format_args!("a")), "starttls-wrapper[42]: warning: a\n");
        assert_eq!(line(Level::Error, format_args!("a")), "starttls-wrapper[42]: error: a\n");
        assert_eq!(line(Level::Debug, format_args!("a")), "starttls-wrapper[42]: debug: a\n");
        assert_eq!(line(Level::Trace, format_args!("a")), "starttls-wrapper[42]: trace: a\n");
    }

    #[test]
    fn a_record_is_one_line_whatever_it_quotes() {
        let text = line(Level::Info, format_args!("{}b{}", "a\r\n", "\u{1b}[2J\u{85}é\t"));
        assert_eq!(text, "starttls-wrapper[42]: a\\x0d\\x0ab\\x1b[2J\\x85é\\x09\n");
    }

    #[test]
    fn printable_ascii_is_kept_and_the_rest_escaped() {
        assert_eq!(escape(b"EHLO mx.example.org ~", 99).to_string(), "EHLO mx.example.org ~");
        assert_eq!(escape(b"a\r\nb\0\x1b\x7f\xff\\n", 99).to_string(), "a\\x0d\\x0ab\\x00\\x1b\\x7f\\xff\\\\n");
    }

    #[test]
    fn what_is_longer_than_max_is_cut() {
        assert_eq!(escape(b"abcde", 5).to_string(), "abcde");
        assert_eq!(escape(b"abcdef", 5).to_string(), "abcde...");
        assert_eq!(escape(b"", 0).to_string(), "");
        assert_eq!(escape(b"a", 0).to_string(), "...");
    }

    #[test]
    fn every_octet_escapes_to_printable_ascii() {
        let all: Vec<u8> = (0..=255).collect();
        assert!(escape(&all, 256).to_string().bytes().all(|octet| (b' '..=b'~').contains(&octet)));
    }
}
