//! The session target's input: a dialogue as tests/dialogues/FORMAT.md has it, so that every file of tests/dialogues is a seed, and a
//! finding is nearly a dialogue. What is expected there (`S:`, `k:`, `! s-eof`) is passed over: here the invariants judge. So is
//! a line that can't be read.
//!
//! | line | beyond FORMAT.md |
//! |---|---|
//! | any | anywhere, headers too; each `C:`, `K:`, `B:` is a segment of its own |
//! | `cut: N` | segments come in pieces of N octets |
//! | `! stall s` `! stall k` `! stall b` | client, child, backend takes nothing from here on |
//! | `! flow` | all take again |
//! | `told: LINE` | with `way: mute`: a command of the environment's `STARTTLS_REPLAY` |

use std::path::Path;
use std::time::Duration;

use starttls_wrapper::session::Policy;

use super::dialogue::{self, Dialogue, Side};
use super::policy::policy_of;

/// Octets of one input, once expanded.
const MOST: usize = 160 * 1024;
/// What one wait lasts at the most: an instant has an end.
const LONGEST: Duration = Duration::from_secs(u16::MAX as u64);

/// One step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Deed {
    Of(dialogue::Deed),
    Stalls(Side),
    Flows,
}

/// One input, read.
#[derive(Debug)]
pub(crate) struct Script {
    pub(crate) policy: Policy,
    pub(crate) piece: usize,
    pub(crate) deeds: Vec<Deed>,
}

/// `None` where the options are none.
#[must_use]
pub(crate) fn parse(input: &[u8]) -> Option<Script> {
    let mut dialogue = Dialogue::new(Path::new("input"));
    let (mut piece, mut deeds, mut left, mut told) = (usize::MAX, Vec::new(), MOST, String::new());
    for line in input.split(|octet| *octet == b'\n') {
        let line = String::from_utf8_lossy(line);
        if let Some(size) = line.strip_prefix("cut: ") {
            piece = size.parse().ok().filter(|size| *size > 0).unwrap_or(piece);
        } else if let Some(command) = line.strip_prefix("told: ") {
            told = format!("{told}{command}\n");
        } else if let Some(deed) = ours(&line) {
            deeds.push(deed);
        } else {
            // One that can't be read says nothing.
            let _ = dialogue.read_line(0, &line);
            dialogue.exit = None;
            deeds.extend(dialogue.steps.drain(..).filter_map(|step| done(step.deed, &mut left)));
        }
    }
    Some(Script { policy: policy_of(&dialogue, &told).ok()?, piece, deeds })
}

fn ours(line: &str) -> Option<Deed> {
    Some(match line {
        "! stall s" => Deed::Stalls(Side::Client),
        "! stall k" => Deed::Stalls(Side::Child),
        "! stall b" => Deed::Stalls(Side::Backend),
        "! flow" => Deed::Flows,
        _ => return None,
    })
}

/// What is done of a dialogue's deed, in measure. Nothing where something is expected.
fn done(deed: dialogue::Deed, left: &mut usize) -> Option<Deed> {
    use dialogue::Deed as Of;
    Some(Deed::Of(match deed {
        Of::Sends(side, mut octets) => {
            octets.truncate(*left);
            *left -= octets.len();
            Of::Sends(side, octets)
        }
        Of::Waits(time) => Of::Waits(time.min(LONGEST)),
        Of::Gets(..) | Of::SeesEnd(_) | Of::SeesAbort(_) | Of::ClientSeesAlert => return None,
        deed => deed,
    }))
}
