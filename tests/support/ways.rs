//! The dialogues are written for the way `tls`. Here is what each other way makes of one: which it has no part in, and how
//! the deeds of the others look there.

use std::fmt;

use starttls_wrapper::session::Way;

use super::dialogue::{Backend, Deed, Dialogue, Side, Step};

const READY: &[u8] = b"220 2.0.0 Ready to start TLS\r\n";

/// How often each way was played, for the log and against a table that applies to nothing.
#[derive(Debug, Default)]
pub(crate) struct Count(Vec<(&'static str, usize)>);

impl Count {
    /// How many dialogues the way has a part in, of those that were found.
    fn of(dialogues: &[Dialogue]) -> Self {
        let times = |way: Way| dialogues.iter().filter(|dialogue| dialogue.way == way).count();
        Self(Way::EVERY.into_iter().map(|way| (way.name(), times(way))).collect())
    }
}

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words: Vec<String> = self.0.iter().map(|(way, times)| format!("{way} {times}")).collect();
        f.write_str(&words.join(", "))
    }
}

/// Each of `dialogues` through every way that it applies to, and how many these are.
pub(crate) fn all(dialogues: &[Dialogue]) -> (Vec<Dialogue>, Count) {
    let through = |way: Way| dialogues.iter().filter_map(move |dialogue| through(way, dialogue));
    let all: Vec<Dialogue> = Way::EVERY.into_iter().flat_map(through).collect();
    let count = Count::of(&all);
    (all, count)
}

fn through(way: Way, dialogue: &Dialogue) -> Option<Dialogue> {
    match way {
        Way::UcspiTls => return in_their_tls(Dialogue { way, ..through(Way::Keep, dialogue)? }),
        Way::UcspiRespawn => return in_their_tls(Dialogue { way, ..through(Way::Respawn, dialogue)? }),
        Way::Mute => return muted(dialogue),
        _ => {}
    }
    let has_option = |name: &str| dialogue.options.iter().any(|option| option.starts_with(name));
    let is_in_the_clear = || {
        let is_tls = |deed: &Deed| matches!(deed, Deed::Backend(what) if !in_the_clear(*what));
        !has_option("--backend") && !dialogue.steps.iter().any(|step| is_tls(&step.deed))
    };
    if dialogue.way != Way::Tls {
        // Written for that way, and for those alone in which a server is come to as late.
        let is_alike = match (dialogue.way, way) {
            // But that a child knows one end only.
            (Way::Respawn, Way::TlsLate | Way::PlainLate) => {
                !dialogue.steps.iter().any(|step| step.deed == Deed::SeesEnd(Side::Backend))
            }
            (Way::TlsLate, Way::PlainLate) => is_in_the_clear(),
            (written, way) => written == way,
        };
        return is_alike.then(|| Dialogue { way, ..dialogue.clone() });
    }
    let steps = match way {
        Way::Tls => Some(dialogue.steps.clone()),
        // Without TLS towards the backend nothing of it can fail.
        Way::Plain => is_in_the_clear().then(|| dialogue.steps.clone()),
        Way::Keep => (!has_option("--backend") && !has_option("--replay")).then(|| kept(&dialogue.steps)).flatten(),
        Way::Respawn => (!has_option("--backend")).then(|| respawned(&dialogue.steps)).flatten(),
        Way::TlsLate => late(&dialogue.steps),
        Way::PlainLate => is_in_the_clear().then(|| late(&dialogue.steps)).flatten(),
        Way::Raw => {
            let no_options = ["--backend", "--replay", "--greeting", "--handshake"].into_iter().any(has_option);
            let steps = if no_options || !dialogue.certificate { None } else { untouched(&dialogue.steps) };
            // What the client does from there on is between it and HOST.
            let is_over = steps.as_ref().is_some_and(|steps| steps.len() == dialogue.steps.len());
            let exit = dialogue.exit.filter(|_| is_over);
            return Some(Dialogue { way, steps: steps?, exit, ..dialogue.clone() });
        }
        Way::UcspiTls | Way::UcspiRespawn | Way::Mute => None, // said above
    };
    Some(Dialogue { way, steps: steps?, ..dialogue.clone() })
}

fn in_the_clear(what: Backend) -> bool {
    match what {
        Backend::Accepts | Backend::Refused => true,
        Backend::Untrusted | Backend::Plaintext | Backend::NoHandshake | Backend::Silent => false,
    }
}

/// The child is asked to forget, and goes on as the backend. `None`: the dialogue is about a backend that fails, or about
/// what the dismissed child still says.
fn kept(steps: &[Step]) -> Option<Vec<Step>> {
    let Some((asked, ready)) = handover(steps) else { return without_backend(steps) };
    let offers_itself = |deed: &Deed| matches!(deed, Deed::Sends(Side::Child, octets) if is_starttls_in(octets));
    let speaks_late = steps[ready..].iter().any(|step| matches!(step.deed, Deed::Sends(Side::Child, _)));
    if fails(steps, asked, ready) || steps[..asked].iter().any(|step| offers_itself(&step.deed)) || speaks_late {
        return None;
    }
    let (before, after) = (steps[asked..ready].iter(), steps[ready..].iter());
    let place = steps[ready].line;
    let mut kept = steps[..asked].to_vec();
    kept.extend(before.filter(|step| !is_backends(&step.deed)).cloned());
    kept.push(Step { line: place, deed: Deed::Gets(Side::Child, b"RSET\r\n".to_vec()) });
    kept.push(Step { line: place, deed: Deed::Sends(Side::Child, b"250 2.0.0 Forgotten\r\n".to_vec()) });
    kept.extend(after.filter_map(|step| Some(Step { line: step.line, deed: by_the_child(&step.deed)? })));
    Some(kept)
}

/// A fresh child takes the backend's place, when the client's TLS stands.
fn respawned(steps: &[Step]) -> Option<Vec<Step>> {
    let mut steps = late(steps)?;
    for step in steps.iter_mut().filter(|step| step.deed == Deed::SeesAbort(Side::Backend)) {
        // A pipe has but one end.
        step.deed = Deed::SeesEnd(Side::Backend);
    }
    Some(steps)
}

/// The server behind greets and is replayed to when the client's TLS stands. `None`: the dialogue is about a backend that fails.
fn late(steps: &[Step]) -> Option<Vec<Step>> {
    let Some((asked, ready)) = handover(steps) else { return without_backend(steps) };
    if fails(steps, asked, ready) {
        return None;
    }
    let (later, before): (Vec<Step>, Vec<Step>) =
        steps[asked..ready].iter().cloned().partition(|step| is_backends(&step.deed) || is_wait(&step.deed));
    let mut steps = [&steps[..asked], &before[..], &steps[ready..]].concat();
    // Without a handshake it hears nothing.
    if let Some(secured) = steps.iter().position(|step| step.deed == Deed::ClientTls) {
        steps.splice(secured + 1..secured + 1, later);
    }
    Some(steps)
}

/// The client's TLS is a UCSPI-TLS server's, and so are its alerts and what is said of its end. `None`: the dialogue is about those, or
/// about a certificate of ours.
fn in_their_tls(mut dialogue: Dialogue) -> Option<Dialogue> {
    let is_alert = |step: &Step| step.deed == Deed::ClientSeesAlert;
    if !dialogue.certificate || dialogue.steps.iter().any(is_alert) {
        return None;
    }
    let secured = dialogue.steps.iter().position(|step| step.deed == Deed::ClientTls).unwrap_or(dialogue.steps.len());
    for step in &mut dialogue.steps[secured..] {
        if step.deed == Deed::SeesAbort(Side::Client) {
            step.deed = Deed::SeesEnd(Side::Client);
        }
    }
    if dialogue.steps[secured..].iter().any(|step| step.deed == Deed::ClientResets) {
        // To us it has ended.
        dialogue.exit = None;
    }
    Some(dialogue)
}

/// `--mute`: behind somebody's TLS, from where the server behind it greets. The client has been in the clear with another, and what
/// that one would have replayed is told. `None`: the dialogue is about what is before, or about more than a child can do.
fn muted(dialogue: &Dialogue) -> Option<Dialogue> {
    let (steps, replayed) = match dialogue.way {
        Way::Tls => {
            let (asked, ready) = handover(&dialogue.steps)?;
            let is_asked = |step: &&Step| matches!(step.deed, Deed::Gets(Side::Backend, _));
            (late(&dialogue.steps)?, dialogue.steps[asked..ready].iter().filter(is_asked).count())
        }
        Way::Respawn => (dialogue.steps.clone(), 1),
        _ => return None,
    };
    let options = dialogue.options.split_first_chunk::<2>().filter(|([name, _], _)| name == "--replay");
    let options = options.map_or(&dialogue.options[..], |(_, others)| others);
    let secured = steps.iter().position(|step| step.deed == Deed::ClientTls)?;
    let behind = &steps[secured + 1..];
    if !options.is_empty() || behind.iter().any(|step| matches!(step.deed, Deed::Sends(Side::Child, _))) {
        return None;
    }
    let asked = behind.iter().filter_map(|step| match &step.deed {
        Deed::Gets(Side::Backend, octets) => Some(String::from_utf8_lossy(octets)),
        _ => None,
    });
    let told = asked.take(replayed).collect();
    let steps = behind.iter().filter_map(|step| {
        let deed = match by_the_child(&step.deed)? {
            // There is no TLS of ours to abort.
            Deed::SeesAbort(Side::Client) => Deed::SeesEnd(Side::Client),
            deed => deed,
        };
        Some(Step { line: step.line, deed })
    });
    Some(Dialogue { way: Way::Mute, options: Vec::new(), told, steps: steps.collect(), ..dialogue.clone() })
}

/// HOST is only dialled: up to the 220 and the child's dismissal.
fn untouched(steps: &[Step]) -> Option<Vec<Step>> {
    let Some((asked, ready)) = handover(steps) else {
        let is_tls = |deed: &Deed| matches!(deed, Deed::Backend(what) if *what != Backend::Refused);
        let speaks = |deed: &Deed| is_backends(deed) && !matches!(deed, Deed::Backend(_));
        return (!steps.iter().any(|step| is_tls(&step.deed) || speaks(&step.deed))).then(|| steps.to_vec());
    };
    if fails(steps, asked, ready) {
        return None;
    }
    let before = steps[asked..ready].iter().filter(|step| !is_backends(&step.deed) && !is_wait(&step.deed));
    let is_childs = |deed: &Deed| matches!(deed, Deed::Gets(Side::Child, _) | Deed::SeesEnd(Side::Child));
    let after = steps[ready + 1..].iter().filter(|step| is_childs(&step.deed));
    Some(steps[..asked].iter().chain(before).chain(&steps[ready..=ready]).chain(after).cloned().collect())
}

/// Where the STARTTLS stands that is served, and its 220.
fn handover(steps: &[Step]) -> Option<(usize, usize)> {
    let ready = steps.iter().position(|step| step.deed == Deed::Gets(Side::Client, READY.to_vec()))?;
    let asked = steps[..ready].iter().rposition(|step| matches!(step.deed, Deed::Sends(Side::Client, _)))?;
    Some((asked, ready))
}

/// The dialogue as it is, if there is nothing of a backend in it.
fn without_backend(steps: &[Step]) -> Option<Vec<Step>> {
    (!steps.iter().any(|step| is_backends(&step.deed))).then(|| steps.to_vec())
}

/// Whether a hand-over fails before the one that is served, or something in that one, or the backend dies.
fn fails(steps: &[Step], asked: usize, ready: usize) -> bool {
    steps[..asked].iter().any(|step| is_backends(&step.deed))
        || steps[asked..ready].iter().any(|step| matches!(step.deed, Deed::Backend(_) | Deed::Ends(_)))
        || steps.iter().any(|step| step.deed == Deed::BackendDies)
}

/// Time that the backend takes.
fn is_wait(deed: &Deed) -> bool {
    matches!(deed, Deed::Waits(_))
}

fn is_backends(deed: &Deed) -> bool {
    matches!(deed, Deed::Sends(Side::Backend, _) | Deed::Gets(Side::Backend, _) | Deed::Backend(_))
        || matches!(deed, Deed::Ends(Side::Backend) | Deed::SeesEnd(Side::Backend) | Deed::BackendDies)
}

fn is_starttls_in(octets: &[u8]) -> bool {
    octets.to_ascii_uppercase().windows(8).any(|window| window == b"STARTTLS")
}

/// A deed behind the 220, the backend being the child. `None`: the child's dismissal, which there is none of.
fn by_the_child(deed: &Deed) -> Option<Deed> {
    Some(match deed {
        Deed::Gets(Side::Child, _) | Deed::SeesEnd(Side::Child) => return None,
        Deed::Sends(Side::Backend, octets) => Deed::Sends(Side::Child, octets.clone()),
        Deed::Gets(Side::Backend, octets) => Deed::Gets(Side::Child, octets.clone()),
        Deed::Ends(Side::Backend) => Deed::Ends(Side::Child),
        // A pipe has but one end.
        Deed::SeesEnd(Side::Backend) | Deed::SeesAbort(Side::Backend) => Deed::SeesEnd(Side::Child),
        deed => deed.clone(),
    })
}
