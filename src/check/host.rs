//! HOST, as a session's hand-over finds it: reached, trusted, greeting, taking the replay; and what it lets a client do.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use super::reach::{REACHED, Road, Stopped, TLS};
use super::relaying::{self, OUTSIDE, OUTSIDE_PORT, Relays, STRANGER};
use super::table::Table;
use super::{HELLO, certificate};
use crate::cli::Config;
use crate::engine::talk::{Reply, Talk};
use crate::session::Way;
use crate::session::replay::Run;
use crate::session::transcript::Transcript;
use crate::smtp::command::Verb;
use crate::sys::dial::Address;
use crate::tls::CertificateDer;

const GREETS: &str = "HOST greets";
const REPLAY: &str = "HOST takes EHLO";
const RELAY: &str = "HOST: open relay";
const LOCAL: &str = "HOST: local client";

/// A HOST, and what is known before it is spoken to.
pub(super) struct Host<'a> {
    pub(super) config: &'a Config,
    pub(super) road: Road<'a>,
    /// The hello that PROG takes.
    pub(super) hello: Option<(Verb, Vec<u8>)>,
    pub(super) own_leaf: Option<CertificateDer<'static>>,
}

impl Host<'_> {
    /// Tries HOST.
    pub(super) fn check(&mut self, table: &mut Table) {
        let ends = self.config.send_proxy.map(|_| ends(OUTSIDE));
        let (mut talk, address) = match self.road.go(ends) {
            Ok(reached) => reached,
            Err(Stopped { step, why }) => {
                table.problem(step, &why, self.advice_for(step));
                return table.untried(RELAY, "HOST can't be spoken to", "See above.");
            }
        };
        table.ok(REACHED, &self.way_there(&address));
        self.say_tls(&talk, table);
        let offers = match self.config.policy.way {
            Way::Raw => self.first_words(&mut talk, table),
            _ => self.replay(&mut talk, table),
        };
        let Some(offers) = offers else { return table.untried(RELAY, "HOST can't be spoken to", "See above.") };
        self.say_offers(&offers, table);
        let patience = self.config.policy.timeouts.replay;
        let answer = relaying::ask(&mut talk, patience);
        let _ = talk.ask("QUIT", Duration::from_secs(2).min(patience));
        drop(talk);
        self.say_relaying(answer, table);
        if self.config.send_proxy.is_some() {
            self.check_local(table);
        }
    }

    fn advice_for(&self, step: &str) -> &'static str {
        match (step, self.config.send_proxy) {
            (REACHED, _) => "Each STARTTLS fails: is it started, and does it listen there?",
            (_, None) => {
                "Each STARTTLS fails: HOST must speak TLS from the first octet, and show a certificate that is believed."
            }
            (_, Some(_)) => {
                "Each STARTTLS fails: HOST must expect the PROXY header, then TLS, and show a certificate that is believed."
            }
        }
    }

    fn way_there(&self, address: &Address) -> String {
        let from = self.config.backend_source.map_or(String::new(), |source| format!(", from {source}"));
        let header = match self.config.send_proxy {
            Some(version) => format!(", with a PROXY header {version:?} for {OUTSIDE}"),
            None => String::new(),
        };
        format!("{address}{from}{header}")
    }

    /// By what its certificate is believed. That it is, a handshake has shown.
    fn say_tls(&self, talk: &Talk, table: &mut Table) {
        let (Some(facts), [leaf, ..]) = (talk.backend().facts(), talk.backend().certificates()) else { return };
        let tls = format!("{} {}", facts.version, facts.suite);
        if self.config.policy.way == Way::Raw {
            table
                .ok(TLS, &format!("{tls}, whose certificate is for clients to judge: {}", certificate::names_of(leaf)));
        } else if self.own_leaf.as_ref() == Some(leaf) {
            return table.ok(TLS, &format!("{tls}, by our own certificate"));
        } else if self.config.backend_insecure {
            let advice =
                "--backend-insecure: whoever gets hold of that port gets all mail. --backend-ca names whom to believe.";
            return table.warning(TLS, &format!("{tls}, by a certificate that nobody checks"), advice);
        } else {
            table.ok(TLS, &format!("{tls}, by a certificate that is believed: {}", certificate::names_of(leaf)));
        }
        certificate::say_days(
            "HOST's days left",
            talk.backend().certificates(),
            "Renew it: then STARTTLS is over.",
            table,
        );
    }

    /// The session's own replay, and EHLO where that has none.
    fn replay(&self, talk: &mut Talk, table: &mut Table) -> Option<Reply> {
        let policy = &self.config.policy;
        let recorded = self.hello.as_slice();
        let steps = Transcript::told(policy.replay, recorded).steps();
        let replayed = talk.replay(Run::new(steps), policy.timeouts.greeting, policy.timeouts.replay);
        let mut replies = replayed.replies.into_iter();
        let greeting = replies.next();
        match (&greeting, &replayed.verdict) {
            (Some(greeting), _) if greeting.code.is(b"220") => table.ok(GREETS, &greeting.to_string()),
            (_, verdict) => {
                let why = verdict.as_ref().err().map_or("it did not greet", String::as_str);
                let found = greeting.as_ref().map_or(why.to_owned(), |greeting| format!("{why}: {greeting}"));
                let advice =
                    "Each STARTTLS fails: HOST must greet with 220, and expect what is sent first (--send-proxy).";
                table.problem(GREETS, &found, advice);
                return None;
            }
        }
        if let Err(why) = replayed.verdict {
            let found = replies.next().map_or(why.clone(), |reply| format!("{why}: {reply}"));
            let advice = "Each STARTTLS fails: HOST must take the EHLO that PROG took, and offer no second STARTTLS.";
            table.problem(REPLAY, &found, advice);
            return None;
        }
        // As the client will: a server that took it in the replay may not take it twice.
        match talk.ask(&format!("EHLO {HELLO}"), policy.timeouts.replay) {
            Ok(reply) if reply.is_good() => {
                table.ok(REPLAY, &reply.offered());
                Some(reply)
            }
            Ok(reply) => refused(&reply.to_string(), table),
            Err(why) => refused(&why, table),
        }
    }

    /// In the way `raw` the client speaks first, inside its TLS: the first reply must be the one to its EHLO.
    fn first_words(&self, talk: &mut Talk, table: &mut Table) -> Option<Reply> {
        let what = "HOST is muted";
        // Without a wait for silence: what greets says that first, before or after it hears us.
        let said = talk.say(&format!("EHLO {HELLO}"));
        match said.and_then(|()| talk.hear(self.config.policy.timeouts.replay)) {
            Ok(reply) if reply.code.is(b"220") => {
                let advice = "Clients would take that for the reply to EHLO: behind HOST's TLS must stand starttls-wrapper --mute.";
                table.problem(what, &format!("it greets inside TLS: {reply}"), advice);
                None
            }
            Ok(reply) if reply.is_good() => {
                table.ok(what, "no greeting inside TLS");
                table.ok(REPLAY, &reply.offered());
                Some(reply)
            }
            Ok(reply) => refused(&reply.to_string(), table),
            Err(why) => refused(&why, table),
        }
    }

    fn say_offers(&self, reply: &Reply, table: &mut Table) {
        if reply.offers("STARTTLS") {
            let advice = "Inside TLS it must not: clients would begin TLS within TLS.";
            table.problem("HOST's STARTTLS", "it offers STARTTLS inside TLS", advice);
        }
        if reply.offers("AUTH") {
            let advice = "Right on port 587. A public MX needs none: every stranger may then try passwords.";
            table.warning("HOST's AUTH", "it offers AUTH inside TLS", advice);
        }
        for word in ["XCLIENT", "XFORWARD"].into_iter().filter(|word| reply.offers(word)) {
            let advice = format!(
                "Any client may say who it is: take our address out of smtpd_authorized_{}_hosts.",
                word.to_lowercase()
            );
            table.problem(&format!("HOST's {word}"), &format!("it offers {word} to what comes through us"), &advice);
        }
    }

    fn say_relaying(&self, answer: Result<Relays, String>, table: &mut Table) {
        let seen_as = match (self.config.send_proxy, self.config.backend_source) {
            (Some(_), _) => format!("the outside client {OUTSIDE}"),
            (None, Some(source)) => format!("{source} (as each client)"),
            (None, None) => "this host (as each client)".to_owned(),
        };
        match answer {
            Ok(Relays::No(reply)) => table.ok(RELAY, &format!("not for {seen_as}: {reply}")),
            Ok(Relays::Yes(reply)) => {
                let advice = if self.config.send_proxy.is_some() {
                    "Every client relays: HOST must expect the header and judge by it."
                } else {
                    "Every client relays: --send-proxy, or --backend-source ADDR and rules at HOST that deny ADDR (README)."
                };
                table.problem(RELAY, &format!("{seen_as} may mail to {STRANGER}: {reply}"), advice);
            }
            Ok(Relays::Unclear(why)) | Err(why) => {
                table.untried(RELAY, &why, "Whether it relays can't be seen from that: ask it by hand, from outside.");
            }
        }
    }

    /// What a client of this host is told, by a header again: where that is something else, the header is believed.
    fn check_local(&mut self, table: &mut Table) {
        let answer = self.road.go(Some(ends(Ipv4Addr::LOCALHOST.into()))).map_err(|stopped| stopped.why).and_then(
            |(mut talk, _)| {
                let times = self.config.policy.timeouts;
                if self.config.policy.way != Way::Raw {
                    talk.hear(times.greeting)?;
                }
                talk.ask(&format!("EHLO {HELLO}"), times.replay)?;
                relaying::ask(&mut talk, times.replay)
            },
        );
        match answer {
            Ok(Relays::Yes(reply)) => table.ok(LOCAL, &format!("127.0.0.1 in the header may relay: {reply}")),
            Ok(Relays::No(reply)) => table.ok(LOCAL, &format!("127.0.0.1 in the header may not relay either: {reply}")),
            Ok(Relays::Unclear(why)) | Err(why) => table.untried(LOCAL, &why, "Nothing depends on it."),
        }
    }
}

fn refused(found: &str, table: &mut Table) -> Option<Reply> {
    table.problem(
        REPLAY,
        found,
        "Inside TLS each client says EHLO again: HOST must take it. With --replay none we say none.",
    );
    None
}

/// The two ends of a client's connection, as a header has them.
fn ends(client: IpAddr) -> [SocketAddr; 2] {
    [SocketAddr::new(client, OUTSIDE_PORT), relaying::local_end()]
}
