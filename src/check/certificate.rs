//! Our certificate, and what strangers will think of it.

use core::ops::RangeInclusive;

use zeroize::Zeroizing;

use super::table::Table;
use crate::cli::{Config, IdentitySource};
use crate::driver::tickets;
use crate::driver::ucspi;
use crate::logging::escape;
use crate::tls::{
    CertificateDer, Identity, Roots, UnixTime, bears_name, certificates, check_chain, names, server_name, server_setup,
    validity,
};

/// From so many days on a certificate is near its end: who renews, by hand or by ACME, has done it by then.
const SOON: i64 = 14;

const DAY: u64 = 24 * 60 * 60;

/// Tries our certificate and key. `greeted_as`: what clients think we are called.
pub(super) fn check(config: &Config, greeted_as: Option<&str>, table: &mut Table) -> Option<Identity> {
    let (cert, key) = match &config.identity {
        IdentitySource::None => {
            table.problem("certificate", "there is none: STARTTLS is not offered", "Name one: --cert, or CERTFILE.");
            return None;
        }
        IdentitySource::SelfSigned(name) => return self_signed(name, table),
        IdentitySource::Files { cert, key } => (cert, key),
    };
    let identity = ucspi::from_files(cert, key).and_then(|identity| match server_setup(&identity, None) {
        Ok(_) => Ok(identity),
        Err(error) => Err(format!("certificate {}, key {}: {error}", cert.display(), key.display())),
    });
    match &identity {
        Ok(_) => table.ok("certificate", &format!("{}: key {} fits", cert.display(), key.display())),
        Err(why) => table.problem("certificate", why, "STARTTLS is not offered with it: mend it, or name another."),
    }
    match config.ticket_keys.as_deref().map(tickets::from_file) {
        Some(Ok(_)) => table.ok("ticket keys", "in order"),
        Some(Err(why)) => {
            table.problem("ticket keys", &why, "Clients resume nothing: a line of openssl rand -base64 48 is a key.")
        }
        None => {}
    }
    let chain =
        std::fs::read(cert).map(Zeroizing::new).ok().and_then(|text| certificates(&text).ok()).unwrap_or_default();
    if !chain.is_empty() {
        say_names(&chain[0], greeted_as, table);
        say_days("days left", &chain, "Renew it.", table);
        say_chain(&chain, table);
    }
    identity.ok()
}

fn self_signed(name: &str, table: &mut Table) -> Option<Identity> {
    match Identity::self_signed(name) {
        Ok(identity) => {
            let advice = "For first runs: clients that check certificates will not come.";
            table.warning("certificate", &format!("a throw-away one for {name}"), advice);
            Some(identity)
        }
        Err(error) => {
            table.problem("certificate", &error.to_string(), "Give --self-signed a host name.");
            None
        }
    }
}

/// The names that a certificate bears, as one line.
pub(super) fn names_of(leaf: &CertificateDer<'_>) -> String {
    let names = names(leaf).join(", ");
    if names.is_empty() { "none".to_owned() } else { escape(names.as_bytes(), 200).to_string() }
}

fn say_names(leaf: &CertificateDer<'_>, greeted_as: Option<&str>, table: &mut Table) {
    let borne = names_of(leaf);
    let unknown = greeted_as.filter(|name| !server_name(name).is_ok_and(|name| bears_name(leaf, &name)));
    match unknown {
        None => table.ok("names", &borne),
        Some(name) => {
            let found = format!("{borne}; PROG greets as {}", escape(name.as_bytes(), 100));
            table.warning(
                "names",
                &found,
                "Clients that check look for the name in your MX record: is it one of these?",
            );
        }
    }
}

/// How long the chain will last: as long as the first of it to go.
pub(super) fn say_days(what: &str, chain: &[CertificateDer<'_>], advice: &str, table: &mut Table) {
    let now = UnixTime::now().as_secs();
    let all: Result<Vec<RangeInclusive<u64>>, _> = chain.iter().map(validity).collect();
    let all = match all {
        Ok(all) => all,
        Err(error) => return table.problem(what, &error.to_string(), advice),
    };
    let until = all.iter().map(|valid| *valid.end()).min().unwrap_or(now);
    let from = all.iter().map(|valid| *valid.start()).max().unwrap_or(now);
    let left = (until.cast_signed() - now.cast_signed()).div_euclid(DAY.cast_signed());
    if until < now {
        table.problem(what, &format!("none: it expired on {}", date(until)), advice);
    } else if from > now {
        table.problem(what, &format!("it is not valid before {}", date(from)), "Wait, or set the clock right.");
    } else if left <= SOON {
        table.warning(what, &format!("{left}, until {}", date(until)), advice);
    } else {
        table.ok(what, &format!("{left}, until {}", date(until)));
    }
}

fn say_chain(chain: &[CertificateDer<'_>], table: &mut Table) {
    let count = match chain.len() {
        1 => "1 certificate".to_owned(),
        more => format!("{more} certificates"),
    };
    match check_chain(chain, &Roots::system(|name| std::env::var_os(name)), UnixTime::now()) {
        Ok(()) => table.ok("chain", &format!("{count}, under a root that this system trusts")),
        Err(error) => table.warning(
            "chain",
            &format!("{count}, under no root that this system trusts: {error}"),
            "Clients that check (MTA-STS) will not come: the file must hold the leaf and all intermediates. DANE needs none.",
        ),
    }
}

/// The day of a time since 1970, as `2026-11-24`; after Howard Hinnant's civil_from_days.
fn date(seconds: u64) -> String {
    let days = seconds / DAY + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let (month, next_year) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    format!("{:04}-{month:02}-{day:02}", year + era * 400 + next_year)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, expected) in [
            (0, "1970-01-01"),
            (951_782_399, "2000-02-28"),
            (951_782_400, "2000-02-29"),
            (951_868_800, "2000-03-01"),
            (1_767_225_599, "2025-12-31"),
            (1_767_225_600, "2026-01-01"),
            (4_107_542_400, "2100-03-01"),
            (253_402_300_799, "9999-12-31"),
        ] {
            assert_eq!(date(seconds), expected);
        }
    }
}
