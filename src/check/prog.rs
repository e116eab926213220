//! PROG, as a stranger's session would have it: the TCP* variables of an outside client, two pipes, our stderr.

use std::path::Path;
use std::time::Duration;

use log::LevelFilter;
use mio::Token;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::HELLO;
use super::relaying::{self, OUTSIDE, OUTSIDE_PORT, Relays, STRANGER};
use super::table::Table;
use crate::cli::{Config, OWN_VARIABLES, Probe};
use crate::driver::greeting;
use crate::engine::Backend;
use crate::engine::talk::{Reply, Talk};
use crate::session::Way;
use crate::session::policy::Replay;
use crate::session::replay::Run;
use crate::session::transcript::Transcript;
use crate::smtp::command::Verb;
use crate::sys::child::Child;
use crate::sys::end::End;
use crate::variables::NAMES;

/// What a UCSPI server says of a TCP client.
const TCP: [&str; 7] =
    ["PROTO", "TCPREMOTEIP", "TCPREMOTEPORT", "TCPREMOTEHOST", "TCPREMOTEINFO", "TCPLOCALIP", "TCPLOCALPORT"];

/// What a fresh PROG is told of a client's TLS.
const IN_TLS: [(&str, &str); 2] = [("SSL_PROTOCOL", "TLSv1.3"), ("SSL_CIPHER", "TLS_AES_128_GCM_SHA256")];

/// A PROG that runs.
struct Prog {
    child: Child,
    talk: Talk,
}

/// What is known of PROG once it was tried.
pub(super) struct Known {
    /// What it greets as.
    pub(super) name: Option<String>,
    /// The hello that it takes.
    pub(super) hello: Option<(Verb, Vec<u8>)>,
}

/// Tries PROG. `None`: it does not even greet.
pub(super) fn check(config: &Config, table: &mut Table) -> Option<Known> {
    let told = config.policy.told.as_slice();
    let (mut prog, name) = match greeted(config, &outside(&[]), told) {
        Ok((prog, greeting)) => {
            table.ok("PROG greets", &greeting.to_string());
            (prog, greeting.name().map(str::to_owned))
        }
        Err(why) => {
            let advice = "PROG must greet with 220 on its fd 1: try it by itself, in this environment.";
            table.problem("PROG greets", &why, advice);
            return None;
        }
    };
    let hello = hello(config, &mut prog.talk, table);
    if config.policy.way.keeps() {
        reset(config, &mut prog.talk, table);
    }
    let outside_relays = relaying::ask(&mut prog.talk, config.policy.timeouts.replay);
    say_outside(outside_relays, table);
    end(prog, config.policy.timeouts.farewell, table);
    check_nobody(config, hello.as_ref(), table);
    if config.policy.way.respawns() {
        check_fresh(config, hello.as_ref(), table);
    }
    if let Some(path) = &config.greeting {
        check_paper(path, config, table);
    }
    Some(Known { name, hello })
}

/// What PROG says by the file of `--greeting`.
fn check_paper(path: &Path, config: &Config, table: &mut Table) {
    let what = "--greeting";
    let learned = match greeting::read(path) {
        Ok(learned) => learned,
        Err(why) => return table.warning(what, &why, "PROG is started for each client: --probe writes such a file."),
    };
    let probe = Probe {
        program: config.program.clone(),
        arguments: config.arguments.clone(),
        timeouts: config.policy.timeouts,
        verbosity: LevelFilter::Off,
    };
    match greeting::check(&learned, &probe) {
        Ok(()) => table.ok(what, &format!("{}: PROG says so", path.display())),
        Err(why) => table.problem(
            what,
            &format!("{} is not what PROG says: {why}", path.display()),
            "Who is told so and then needs PROG may get a 421: write it anew by --probe.",
        ),
    }
}

/// The environment of a client from outside, and what else there is to say.
fn outside(more: &[(&'static str, &'static str)]) -> Vec<(&'static str, String)> {
    let local = relaying::local_end();
    let client = [
        ("PROTO", "TCP".to_owned()),
        ("TCPREMOTEIP", OUTSIDE.to_string()),
        ("TCPREMOTEPORT", OUTSIDE_PORT.to_string()),
        ("TCPLOCALIP", local.ip().to_string()),
        ("TCPLOCALPORT", local.port().to_string()),
    ];
    client.into_iter().chain(more.iter().map(|(name, value)| (*name, (*value).to_owned()))).collect()
}

/// Starts PROG, has it greet, and tells it what was recorded elsewhere.
fn greeted(
    config: &Config,
    variables: &[(&'static str, String)],
    told: &[(Verb, Vec<u8>)],
) -> Result<(Prog, Reply), String> {
    let mut prog = start(config, variables)?;
    let run = Run::new(Transcript::told(Replay::All, told).steps());
    let times = config.policy.timeouts;
    let replayed = prog.talk.replay(run, times.greeting, times.replay);
    match (replayed.verdict, replayed.replies.into_iter().next()) {
        (Ok(()), Some(greeting)) => Ok((prog, greeting)),
        (Ok(()), None) => Err("it did not greet".to_owned()),
        (Err(why), reply) => {
            let reply = reply.map_or(String::new(), |reply| format!(": {reply}"));
            let ended = how_it_ended(&mut prog.child).map_or(String::new(), |ended| format!(" ({ended})"));
            dismiss(prog, times.farewell);
            Err(format!("{why}{reply}{ended}"))
        }
    }
}

fn start(config: &Config, variables: &[(&'static str, String)]) -> Result<Prog, String> {
    let cannot = |error| format!("it can't be started: {}: {error}", config.program.display());
    let without = [&OWN_VARIABLES[..], &TCP, &NAMES].concat();
    let variables = variables.iter().map(|(name, value)| (*name, value.as_str()));
    let mut child = Child::start_with(&config.program, &config.arguments, &without, variables).map_err(cannot)?;
    let pipe = |end: Option<_>| end.map(|end| End::pipe(end, Token(0))).transpose().map_err(cannot);
    let (Some(from), to) = (pipe(child.stdout.take())?, pipe(child.stdin.take())?) else {
        return Err("it has no stdout".to_owned());
    };
    Ok(Prog { child, talk: Talk::new(Backend::child(from, to)) })
}

/// EHLO, and what it offers; HELO where that is refused.
fn hello(config: &Config, talk: &mut Talk, table: &mut Table) -> Option<(Verb, Vec<u8>)> {
    let patience = config.policy.timeouts.replay;
    let line = format!("EHLO {HELLO}");
    match talk.ask(&line, patience) {
        Err(why) => {
            table.problem("PROG takes EHLO", &why, "No client gets any further: try PROG by itself.");
            return None;
        }
        Ok(reply) if reply.is_good() => {
            table.ok("PROG takes EHLO", &reply.offered());
            say_offers(config, &reply, table);
            return Some((Verb::Ehlo, line.into_bytes()));
        }
        Ok(reply) => table.warning(
            "PROG takes EHLO",
            &reply.to_string(),
            "STARTTLS is offered in the reply to EHLO alone: no client will find it.",
        ),
    }
    let line = format!("HELO {HELLO}");
    talk.ask(&line, patience).is_ok_and(|reply| reply.is_good()).then_some((Verb::Helo, line.into_bytes()))
}

/// What of its offers is somebody's business.
fn say_offers(config: &Config, reply: &Reply, table: &mut Table) {
    let way = config.policy.way;
    if reply.offers("STARTTLS") {
        let found = "it offers STARTTLS itself";
        if way.keeps() || way.respawns() || way == Way::Mute {
            let advice = "Behind our TLS it must not: take its certificate away from PROG, or choose another way.";
            table.problem("PROG's STARTTLS", found, advice);
        } else {
            table.ok("PROG's STARTTLS", "it offers STARTTLS itself: ours takes the place of it");
        }
    }
    if reply.offers("AUTH") && !config.policy.require_tls && way != Way::Mute {
        let advice =
            "Passwords can be sent in the clear: --require-tls hides AUTH until TLS is there (not on a public MX).";
        table.warning("PROG's AUTH", "it offers AUTH before TLS", advice);
    }
    for word in ["XCLIENT", "XFORWARD"].into_iter().filter(|word| reply.offers(word)) {
        let advice = format!("Clients could say who they are: let nobody use {word} on this PROG.");
        table.problem(&format!("PROG's {word}"), &format!("it offers {word} to {OUTSIDE}"), &advice);
    }
}

/// What PROG is told when it goes on behind TLS, and then hears from each client.
fn reset(config: &Config, talk: &mut Talk, table: &mut Table) {
    let patience = config.policy.timeouts.replay;
    let advice = "The way keep needs both: choose --way respawn, or another PROG.";
    match talk.ask("RSET", patience) {
        Ok(reply) if reply.is_good() => {}
        Ok(reply) => return table.problem("PROG is kept", &format!("it answers {reply} to RSET"), advice),
        Err(why) => return table.problem("PROG is kept", &format!("RSET: {why}"), advice),
    }
    match talk.ask(&format!("EHLO {HELLO}"), patience) {
        Ok(reply) if reply.is_good() => table.ok("PROG is kept", "it takes RSET, and EHLO a second time"),
        Ok(reply) => table.problem("PROG is kept", &format!("it answers {reply} to a second EHLO"), advice),
        Err(why) => table.problem("PROG is kept", &format!("a second EHLO: {why}"), advice),
    }
}

fn say_outside(answer: Result<Relays, String>, table: &mut Table) {
    let what = "PROG: open relay";
    match answer {
        Ok(Relays::No(reply)) => table.ok(what, &format!("not for the outside client {OUTSIDE}: {reply}")),
        Ok(Relays::Yes(reply)) => table.problem(
            what,
            &format!("the outside client {OUTSIDE} may mail to {STRANGER}: {reply}"),
            "Anybody can send through it: is RELAYCLIENT set here, or is this one that trusts a pipe (README, which servers)?",
        ),
        Ok(Relays::Unclear(why)) | Err(why) => {
            table.untried(what, &why, "Whether it relays can't be seen from that: ask it by hand, from outside.");
        }
    }
}

/// PROG where nobody says who the client is, as under inetd.
fn check_nobody(config: &Config, hello: Option<&(Verb, Vec<u8>)>, table: &mut Table) {
    let what = "PROG: no client";
    let asked = greeted(config, &[], &config.policy.told).and_then(|(mut prog, _)| {
        let patience = config.policy.timeouts.replay;
        let greeted = hello.map(|(_, line)| prog.talk.ask(&String::from_utf8_lossy(line), patience)).transpose();
        let answer = greeted.and_then(|_| relaying::ask(&mut prog.talk, patience));
        let _ = prog.talk.ask("QUIT", config.policy.timeouts.farewell);
        dismiss(prog, config.policy.timeouts.farewell);
        answer
    });
    match asked {
        Ok(Relays::No(reply)) => table.ok(what, &format!("no relay without TCPREMOTEIP either: {reply}")),
        Ok(Relays::Yes(reply)) => table.warning(
            what,
            &format!("without TCPREMOTEIP all may mail to {STRANGER}: {reply}"),
            "Start us under a UCSPI server, or behind tcp-env: both set TCPREMOTEIP.",
        ),
        Ok(Relays::Unclear(why)) | Err(why) => {
            table.untried(what, &format!("without TCPREMOTEIP: {why}"), "It matters where no UCSPI server starts us.");
        }
    }
}

/// The fresh PROG of the way `respawn`.
fn check_fresh(config: &Config, hello: Option<&(Verb, Vec<u8>)>, table: &mut Table) {
    let what = "fresh PROG";
    let advice =
        "Behind TLS each client would get a 421: PROG must start as well with SSL_PROTOCOL and SSL_CIPHER set.";
    let times = config.policy.timeouts;
    let mut prog = match start(config, &outside(&IN_TLS)) {
        Ok(prog) => prog,
        Err(why) => return table.problem(what, &why, advice),
    };
    let steps = Transcript::told(config.policy.replay, hello.map(core::slice::from_ref).unwrap_or_default()).steps();
    let verdict = prog.talk.replay(Run::new(steps), times.greeting, times.replay).verdict;
    let _ = prog.talk.ask("QUIT", times.farewell);
    dismiss(prog, times.farewell);
    match verdict {
        Ok(()) => table.ok(what, "it starts with SSL_* set, and takes what is replayed"),
        Err(why) => table.problem(what, &why, advice),
    }
}

/// QUIT, and its end.
fn end(mut prog: Prog, patience: Duration, table: &mut Table) {
    let bye = prog.talk.ask("QUIT", patience);
    let what = "PROG ends";
    match (dismiss(prog, patience), bye) {
        (None, Ok(reply)) => table.ok(what, &format!("on QUIT: {reply}")),
        (None, Err(why)) => table.ok(what, &format!("on QUIT, without a whole reply: {why}")),
        (Some(signal), _) => table.warning(
            what,
            &format!("{} s after QUIT it took {signal}", patience.as_secs()),
            "Each session that goes on elsewhere would keep it for so long: it should end on QUIT, and with its input.",
        ),
    }
}

/// Its end, as a session sees to it: its input ends; who stays is signalled, and reaped. Which signal it took.
fn dismiss(mut prog: Prog, patience: Duration) -> Option<&'static str> {
    prog.talk.close();
    if ends_within(&mut prog.child, patience) {
        return None;
    }
    let _ = prog.child.kill(false);
    // What still stays is killed when it is dropped.
    Some(if ends_within(&mut prog.child, patience) { "SIGTERM" } else { "SIGKILL" })
}

fn ends_within(child: &mut Child, patience: Duration) -> bool {
    let patience = Timespec::try_from(patience).unwrap_or_default();
    if let Ok(exit) = child.exit_event() {
        let _ = poll(&mut [PollFd::new(&exit, PollFlags::IN)], Some(&patience));
    }
    !matches!(child.try_reap(), Ok(None))
}

/// How a PROG that has closed its output ended, if it does so in a moment.
fn how_it_ended(child: &mut Child) -> Option<String> {
    ends_within(child, Duration::from_millis(500))
        .then(|| child.try_reap().ok().flatten())
        .flatten()
        .map(|status| status.to_string())
}
