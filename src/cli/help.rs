//! `--help`, `--help-listen`, and the README's table: the options as a reader sees them.

use super::options::{Group, OPTIONS, OptionSpec};

/// Headings, in the order of `--help`; the last one's options have a page of their own, `--help-listen`.
const HEADINGS: [(Group, &str); 6] = [
    (Group::Certificate, "Certificate (without one, STARTTLS is not offered):"),
    (Group::Backend, "Backend, the server behind TLS:"),
    (Group::Policy, "Policy:"),
    (Group::Timeouts, "Time-outs, in seconds:"),
    (Group::General, "General:"),
    (Group::Listener, "Listener (in place of a UCSPI server; one process for all sessions):"),
];

/// Where the meanings start in `--help`, in columns.
const MEANING_COLUMN: usize = 33;

/// The text of `--help`: at most 60 lines of 100 columns.
#[must_use]
pub fn help() -> String {
    page(
        concat!(
            "Usage: starttls-wrapper [--way tls|plain|raw] [OPTIONS] {HOST PORT | unix:PATH} PROG [ARGS...]\n",
            "       starttls-wrapper --way {keep|respawn|ucspi-tls[-respawn]} [OPTIONS] PROG [ARGS...]\n",
            "       starttls-wrapper {--mute | --probe} [OPTIONS] PROG [ARGS...]\n",
            "Runs PROG, a plaintext SMTP server, for fds 0 and 1; a client's STARTTLS leads to HOST PORT.\n",
        ),
        |group| !matches!(group, Group::Listener | Group::Hidden),
    )
}

/// The text of `--help-listen`, within the same bounds.
#[must_use]
pub fn help_listen() -> String {
    page(
        concat!(
            "Usage: starttls-wrapper --listen ADDR:PORT [--way tls|plain|raw] [OPTIONS] HOST PORT PROG [ARGS...]\n",
            "       starttls-wrapper --listen ADDR:PORT --way keep [OPTIONS] PROG [ARGS...]\n",
            "Serves all clients of these addresses from one process. --help has the options of every session.\n",
        ),
        |group| group == Group::Listener,
    )
}

fn page(usage: &str, has: impl Fn(Group) -> bool) -> String {
    let mut text = String::with_capacity(4096);
    text.push_str(usage);
    for (group, heading) in HEADINGS.into_iter().filter(|(group, _)| has(*group)) {
        text.push('\n');
        text.push_str(heading);
        text.push('\n');
        for spec in OPTIONS.iter().filter(|spec| spec.group == group) {
            let start = text.len() + "  ".len() + MEANING_COLUMN;
            text.push_str("  ");
            text.push_str(&synopsis(spec));
            while text.len() < start {
                text.push(' ');
            }
            text.push_str(spec.meaning);
            if let (false, Some(env)) = (spec.long.is_empty(), spec.env) {
                text.push_str(" [$");
                text.push_str(env);
                text.push(']');
            }
            if !spec.default.is_empty() {
                text.push_str(" [");
                text.push_str(spec.default);
                text.push(']');
            }
            text.push('\n');
        }
    }
    text
}

/// The table as the README shows it, in Markdown.
#[must_use]
pub fn help_markdown() -> String {
    let mut text = String::with_capacity(4096);
    text.push_str("| option | environment | default | meaning |\n|---|---|---|---|\n");
    for (group, _) in HEADINGS {
        for spec in OPTIONS.iter().filter(|spec| spec.group == group) {
            let quoted = |words: &str| {
                if words.is_empty() { String::new() } else { format!("`{}`", words.replace('|', "\\|")) }
            };
            let option = if spec.long.is_empty() { String::new() } else { quoted(&synopsis(spec)) };
            let default = match spec.group {
                Group::Timeouts => format!("{} s", spec.default),
                _ => spec.default.to_owned(),
            };
            let env = quoted(spec.env.unwrap_or_default());
            text.push_str(&format!("| {option} | {env} | {default} | {} |\n", spec.meaning));
        }
    }
    text
}

/// `-v, --verbose`, `--cert FILE`, `TLS_UID`.
fn synopsis(spec: &OptionSpec) -> String {
    if spec.long.is_empty() {
        return format!("${}", spec.env.unwrap_or_default());
    }
    let short = spec.short.map_or(String::new(), |letter| format!("-{letter}, "));
    let value = spec.value.map_or(String::new(), |name| format!(" {name}"));
    format!("{short}--{}{value}", spec.long)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn help_fits_60_lines_of_100_columns() {
        for text in [help(), help_listen()] {
            assert!(text.lines().count() <= 60, "{} lines", text.lines().count());
            for line in text.lines() {
                assert!(line.chars().count() <= 100, "{} columns: {line}", line.chars().count());
                assert_eq!(line.trim_end(), line);
            }
        }
    }

    #[test]
    fn help_and_markdown_show_every_row_but_the_hidden_one() {
        for spec in &OPTIONS {
            let shown = spec.group != Group::Hidden;
            let row = format!("  {} ", synopsis(spec));
            let is_listeners = spec.group == Group::Listener;
            assert_eq!(help().contains(&row), shown && !is_listeners, "{}", spec.called());
            assert_eq!(help_listen().contains(&row), is_listeners, "{}", spec.called());
            assert_eq!(help_markdown().contains(spec.meaning), shown, "{}", spec.called());
        }
    }

    #[test]
    fn the_table_leaves_a_gap_between_name_and_meaning() {
        for spec in &OPTIONS {
            assert!(synopsis(spec).len() + 2 <= MEANING_COLUMN, "{}", synopsis(spec));
        }
    }

    #[test]
    fn the_readme_shows_this_table() {
        let readme = include_str!("../../README.md");
        let shown = readme.split("<!-- options -->\n").nth(1).and_then(|rest| rest.split("<!-- /options -->").next());
        assert_eq!(shown, Some(help_markdown().as_str()));
    }
}
