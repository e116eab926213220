//! What README.md tells an administrator to write, taken from there, so that it is the README that is tried.

use crate::stage::Stage;

const README: &str = include_str!("../../README.md");

/// The first fenced block behind this text.
#[track_caller]
pub(crate) fn block_behind(text: &str) -> &'static str {
    let (_, behind) = README.split_once(text).unwrap_or_else(|| panic!("README.md has no {text:?}"));
    let (_, fenced) = behind.split_once("\n```").expect("a block");
    let (_language, block) = fenced.split_once('\n').expect("a block");
    block.split_once("```").expect("the block's end").0
}

/// The text with other words for those that name an administrator's own things; each must be there.
#[track_caller]
pub(crate) fn with(text: &str, words: &[(&str, &str)]) -> String {
    words.iter().fold(text.to_owned(), |text, (theirs, ours)| {
        assert!(text.contains(theirs), "no {theirs:?} in {text:?}");
        text.replace(theirs, ours)
    })
}

/// The units of a UCSPI child, and what they name as the program; and those of a listener.
const CHILD: (&[&str], &str) = (&["smtp-in.socket", "smtp-in@.service"], "/var/qmail/bin/tcp-env");
const LISTENER: (&[&str], &str) =
    (&["starttls-wrapper.socket", "starttls-wrapper@.service"], "/usr/local/bin/starttls-wrapper");

/// What `systemd-analyze verify` has to say of these units with a change, and with this program, which must exist, for theirs.
fn verified((units, theirs): (&[&str], &str), program: &str, change: (&str, &str)) -> (bool, String) {
    let stage = Stage::new();
    let mut command = stage.command(["systemd-analyze", "verify", "--man=no"]);
    for name in units {
        let unit = block_behind(&format!("`/etc/systemd/system/{name}`:"));
        command.arg(stage.write(name, unit.replace(theirs, program).replace(change.0, change.1)));
    }
    let done = stage.run(&mut command, b"");
    (done.status.success(), done.output)
}

#[test]
fn systemd_has_nothing_against_the_units() {
    for units in [CHILD, LISTENER] {
        assert_eq!(verified(units, "/bin/true", ("", "")), (true, String::new()));
    }
}

/// It would have: of a program that is missing, of an unknown setting, of a value that is none, of a socket without its section.
#[test]
fn systemd_names_what_is_wrong_with_units() {
    let changes = [("Accept=", "Acept="), ("StandardInput=socket", "StandardInput=sockets"), ("[Socket]\n", "")];
    let others = [("KillMode=", "KilMode="), ("Type=notify", "Type=notice"), ("[Socket]\n", "")];
    for (units, changes, name) in [(CHILD, changes, "smtp-in"), (LISTENER, others, "starttls-wrapper")] {
        let (is_good, said) = verified(units, "/no/such/program", ("", ""));
        assert!(!is_good && said.contains("Command /no/such/program is not executable"), "{said}");
        for change in changes {
            let (_, said) = verified(units, "/bin/true", change);
            assert!(said.contains(name), "{change:?}: {said:?}");
        }
    }
}
