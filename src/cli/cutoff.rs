//! `--cutoff LIST`: verbs, `commands=N` and `seconds=N`.

use core::time::Duration;

use super::config::{parsed, usage};
use crate::error::Fatal;
use crate::session::policy::Cutoff;
use crate::smtp::command::{Kind, Verb};

/// The default verbs always stay: what follows one of them is mail, credentials or another speaker, and can't be snooped.
pub(super) fn cutoff(list: &str) -> Result<Cutoff, Fatal> {
    let mut cutoff = Cutoff::default();
    for item in list.split(',') {
        match item.split_once('=') {
            Some(("commands", count)) => cutoff.commands = Some(cutoff_count(item, count)?),
            Some(("seconds", count)) => cutoff.after = Some(Duration::from_secs(cutoff_count(item, count)?.into())),
            Some(_) => return bad_cutoff(item),
            None => {
                let verb = cutoff_verb(item)?;
                if !cutoff.verbs.contains(&verb) {
                    cutoff.verbs.push(verb);
                }
            }
        }
    }
    Ok(cutoff)
}

fn cutoff_count(item: &str, count: &str) -> Result<u32, Fatal> {
    match parsed(count) {
        Some(count) if count > 0 => Ok(count),
        _ => usage(format!("--cutoff: {item:?} wants a number from 1 to {}", u32::MAX)),
    }
}

fn cutoff_verb(item: &str) -> Result<Verb, Fatal> {
    let Some(verb) = Verb::named(item.as_bytes()) else { return bad_cutoff(item) };
    match verb.kind() {
        _ if matches!(verb, Verb::Ehlo | Verb::Starttls) => {
            usage(format!("--cutoff: {item} can't be one, STARTTLS needs it"))
        }
        Kind::Claim | Kind::Foreign | Kind::Disguised => {
            usage(format!("--cutoff: {item} can't be one, it is always refused"))
        }
        Kind::Hello | Kind::Harmless | Kind::Cutoff => Ok(verb),
        Kind::Starttls | Kind::Unknown => bad_cutoff(item),
    }
}

fn bad_cutoff<T>(item: &str) -> Result<T, Fatal> {
    usage(format!("--cutoff takes verbs, commands=N and seconds=N, comma-separated, not {item:?}"))
}
