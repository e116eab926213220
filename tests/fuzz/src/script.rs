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
//! | `learned: LINE` | a line of what was learned of the child (`src/session/learned.rs`): it comes when it is summoned, and is stood in for |
//! | `unlearned` | it comes when it is summoned, at once |
//! | `! summon fails` `! summon never` | from here on it can't be started, or never comes |

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use starttls_wrapper::session::learned::Learned;
use starttls_wrapper::session::{Phase, Policy, StandIn};

use super::dialogue::{self, Dialogue, Side};
use super::policy::policy_of;

/// Where the client comes from.
const CLIENT: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 7));
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
    Summons(Summon),
}

/// What becomes of a summons.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Summon {
    #[default]
    Arrives,
    Fails,
    Never,
}

/// The child, as the session begins.
#[derive(Debug)]
pub(crate) enum Front {
    There,
    Summoned,
    StoodInFor(StandIn),
}

/// One input, read.
#[derive(Debug)]
pub(crate) struct Script {
    pub(crate) policy: Policy,
    pub(crate) front: Front,
    pub(crate) piece: usize,
    pub(crate) deeds: Vec<Deed>,
}

/// `None` where the options are none.
#[must_use]
pub(crate) fn parse(input: &[u8]) -> Option<Script> {
    let mut dialogue = Dialogue::new(Path::new("input"));
    let (mut piece, mut deeds, mut left, mut told) = (usize::MAX, Vec::new(), MOST, String::new());
    let (mut learned, mut is_summoned) = (String::new(), false);
    for line in input.split(|octet| *octet == b'\n') {
        let line = String::from_utf8_lossy(line);
        if let Some(size) = line.strip_prefix("cut: ") {
            piece = size.parse().ok().filter(|size| *size > 0).unwrap_or(piece);
        } else if let Some(command) = line.strip_prefix("told: ") {
            told = format!("{told}{command}\n");
        } else if let Some(text) = line.strip_prefix("learned: ") {
            learned = format!("{learned}{text}\n");
        } else if line == "unlearned" {
            is_summoned = true;
        } else if let Some(deed) = ours(&line) {
            deeds.push(deed);
        } else {
            // One that can't be read says nothing.
            let _ = dialogue.read_line(0, &line);
            dialogue.exit = None;
            deeds.extend(dialogue.steps.drain(..).filter_map(|step| done(step.deed, &mut left)));
        }
    }
    let policy = policy_of(&dialogue, &told).ok()?;
    let stand_in = || StandIn::new(Arc::new(Learned::parse(&learned).ok()?), Some(CLIENT));
    // Behind --mute the child is there from the start.
    let front = match stand_in().filter(|_| Phase::first(policy.way) == Phase::Snoop) {
        Some(stand_in) => Front::StoodInFor(stand_in),
        None if is_summoned && Phase::first(policy.way) == Phase::Snoop => Front::Summoned,
        None => Front::There,
    };
    Some(Script { policy, front, piece, deeds })
}

fn ours(line: &str) -> Option<Deed> {
    Some(match line {
        "! stall s" => Deed::Stalls(Side::Client),
        "! stall k" => Deed::Stalls(Side::Child),
        "! stall b" => Deed::Stalls(Side::Backend),
        "! flow" => Deed::Flows,
        "! summon fails" => Deed::Summons(Summon::Fails),
        "! summon never" => Deed::Summons(Summon::Never),
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
