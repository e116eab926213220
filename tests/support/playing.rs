//! A dialogue played against the program, step by step, and what must be true at its end.

use starttls_wrapper::session::Way;

use crate::child::Child;
use crate::dialogue::{Deed, Dialogue, Side};
use crate::door::{Door, Shape, Start, tls_client};
use crate::stream::wait_until;
use crate::wire::{End, PATIENCE, shown};

/// Plays `dialogue` against the program. The message of a failure begins with `file:line`.
pub(crate) fn play(dialogue: &Dialogue, shape: Shape) -> Result<(), String> {
    // A dialogue's SIGTERM is that of a UCSPI child, which waits for nobody.
    let drain: &[&str] = if shape == Shape::Listener { &["--drain", "0"] } else { &[] };
    let options: Vec<&str> = dialogue.options.iter().map(String::as_str).chain(drain.iter().copied()).collect();
    let told = [("STARTTLS_REPLAY", dialogue.told.as_str())];
    let start = Start {
        options: &options,
        certificate: dialogue.certificate,
        environment: &told[..usize::from(!dialogue.told.is_empty())],
        way: dialogue.way,
        tls_server: dialogue.way.is_ucspi_tls().then_some("serve"),
        shape,
        ..Start::default()
    };
    let mut door = Door::open(&start);
    let refused = dialogue.steps.iter().any(|s| s.deed == Deed::Backend(crate::dialogue::Backend::Refused));
    if !refused {
        door.backend.listen();
    }
    let first = dialogue.steps.first().map_or(1, |s| s.line);
    let played = Child::accept(&door.puppets).map_err(|why| format!("{}: {why}", dialogue.place(first))).and_then(
        |mut child| {
            for (at, step) in dialogue.steps.iter().enumerate() {
                perform(dialogue, at, &mut door, Some(&mut child))
                    .map_err(|why| format!("{}: {why}", dialogue.place(step.line)))?;
            }
            finish(dialogue, shape, &mut door, Some(&mut child))
        },
    );
    played.map_err(|why| format!("{why}\n    stderr: {}", door.said().trim_end().replace('\n', "\n            ")))
}

/// One step; a listener's child may not have been started.
pub(crate) fn perform(
    dialogue: &Dialogue,
    at: usize,
    door: &mut Door,
    child: Option<&mut Child>,
) -> Result<(), String> {
    let child = child.ok_or("there is no child");
    let step = &dialogue.steps[at];
    let respawns = dialogue.way.respawns();
    let gone = || "the client is gone already".to_owned();
    match &step.deed {
        Deed::Sends(Side::Client, octets) => door.client.as_mut().ok_or_else(gone)?.send(octets),
        Deed::Sends(Side::Child, octets) => child?.send(octets),
        Deed::Sends(Side::Backend, octets) if respawns => door.fresh()?.send(octets),
        Deed::Sends(Side::Backend, octets) => door.backend.wire()?.send(octets),
        Deed::Gets(Side::Client, octets) => {
            door.client.as_mut().ok_or_else(gone)?.get(octets)?;
            if octets.starts_with(b"454 4.7.0 TLS not available") {
                nothing("backend", &door.backend.forget())?;
            }
        }
        Deed::Gets(Side::Child, octets) => child?.get(octets)?,
        Deed::Gets(Side::Backend, octets) if respawns => door.fresh()?.get(octets).map_err(|e| format!("fresh {e}"))?,
        Deed::Gets(Side::Backend, octets) => door.backend.wire()?.get(octets).map_err(|e| format!("backend {e}"))?,
        Deed::Ends(Side::Client) => door.client.as_mut().ok_or_else(gone)?.end(),
        Deed::Ends(Side::Child) => child?.exit(0),
        Deed::Ends(Side::Backend) if respawns => door.fresh()?.exit(0),
        Deed::Ends(Side::Backend) => door.backend.wire()?.end(),
        Deed::ClientResets => door.client.take().ok_or_else(gone)?.reset(),
        Deed::BackendDies if dialogue.way.secures_host() => door.backend.wire()?.cut(),
        // In the clear only a reset is no end.
        Deed::BackendDies => {
            door.backend.wire()?;
            door.backend.take().reset();
        }
        Deed::Backend(what) => door.backend.play(*what),
        Deed::ClientTls => door.client.as_mut().ok_or_else(gone)?.secure(tls_client())?,
        // That nothing happens for so long is what the script asks for; what does is seen by the next step. A program that ends
        // meanwhile need not be waited for.
        Deed::Waits(time) => drop(wait_until(*time, || door.program.try_wait().is_ok_and(|ended| ended.is_some()))),
        Deed::Terminates => {
            rustix::process::kill_process(door.pid(), rustix::process::Signal::TERM).map_err(|e| e.to_string())?;
        }
        Deed::SeesEnd(Side::Client) => expect_end(door.client.as_mut().ok_or_else(gone)?.get_end()?, &[End::Clean])?,
        Deed::SeesEnd(side @ Side::Backend) if respawns => sees_end(dialogue, at, *side, door.fresh()?)?,
        Deed::SeesEnd(side @ Side::Child) => sees_end(dialogue, at, *side, child?)?,
        Deed::SeesEnd(Side::Backend) => expect_end(door.backend.wire()?.get_end()?, &[End::Clean])?,
        Deed::SeesAbort(Side::Client) => {
            expect_end(door.client.as_mut().ok_or_else(gone)?.get_end()?, &[End::Cut, End::Reset])?;
        }
        Deed::SeesAbort(Side::Backend) => {
            // In the clear an abort looks like an end.
            let cut = if dialogue.way.secures_host() { End::Cut } else { End::Clean };
            expect_end(door.backend.wire()?.get_end()?, &[cut, End::Reset])?;
        }
        Deed::SeesAbort(Side::Child) => return Err("a child sees no abort".to_owned()),
        Deed::ClientSeesAlert => {
            let (octets, end) = door.client.as_mut().ok_or_else(gone)?.rest()?;
            expect_end(end, &[End::Clean])?;
            if octets.len() != 7 || !octets.starts_with(&[21, 3]) {
                return Err(format!("expected one TLS alert, received {}", shown(&octets)));
            }
        }
    }
    Ok(())
}

/// A child that has nothing more to say goes when its input ends.
fn sees_end(dialogue: &Dialogue, at: usize, who: Side, child: &mut Child) -> Result<(), String> {
    child.get_end()?;
    let acts = |deed: &Deed| matches!(deed, Deed::Sends(side, _) | Deed::Ends(side) if *side == who);
    if !dialogue.steps.iter().skip(at + 1).any(|step| acts(&step.deed)) {
        child.exit(0);
    }
    Ok(())
}

fn expect_end(end: End, allowed: &[End]) -> Result<(), String> {
    if allowed.contains(&end) {
        Ok(())
    } else {
        Err(format!("expected the end to be one of {allowed:?}, it is {end:?}"))
    }
}

fn nothing(who: &str, octets: &[u8]) -> Result<(), String> {
    if octets.is_empty() { Ok(()) } else { Err(format!("{who} got {} unasked", shown(octets))) }
}

/// Nothing is left over, the program ends with the right code, and its child is no more.
pub(crate) fn finish(
    dialogue: &Dialogue,
    shape: Shape,
    door: &mut Door,
    mut child: Option<&mut Child>,
) -> Result<(), String> {
    let last = dialogue.exit.map_or_else(|| dialogue.steps.last().map_or(1, |s| s.line), |(line, _)| line);
    let at = |why: String| format!("{}: at the end: {why}", dialogue.place(last));
    if let Some(child) = &mut child {
        nothing("child", &child.left_over()).map_err(at)?;
        child.exit(0);
    }
    if let Some(mut client) = door.client.take() {
        nothing("client", &client.left_over()).map_err(at)?;
        client.end();
        if dialogue.exit.is_some() {
            let (octets, _) = client.rest().map_err(at)?;
            nothing("client", &octets).map_err(at)?;
        }
    }
    // HOST goes when the client has gone.
    if dialogue.way == Way::Raw && door.backend.is_dialled() {
        door.backend.wire().map_err(at)?;
    }
    nothing("backend", &door.backend.forget()).map_err(at)?;
    if let Some(fresh) = &mut door.fresh {
        nothing("the fresh child", &fresh.left_over()).map_err(at)?;
        fresh.exit(0);
    }
    // A listener goes on, and knows no code of a session's.
    let code = if shape == Shape::Listener {
        if !wait_until(PATIENCE, || door.said().contains(" end=\"")) {
            return Err(at("the session does not end".to_owned()));
        }
        door.kill(rustix::process::Signal::TERM);
        Some(0)
    } else {
        dialogue.exit.map(|(_, code)| code)
    };
    let status = door.wait().map_err(at)?;
    if code.is_some() && status.code() != code {
        return Err(at(format!("{status}, not {code:?}")));
    }
    for child in [child.as_deref(), door.fresh.as_ref()].into_iter().flatten() {
        if !child.is_gone(PATIENCE) {
            return Err(at(format!("the child {} is still there", child.report.pid)));
        }
    }
    Ok(())
}
