//! What a connection has come to since the last look, for the log and for its loop's figures. Called after whatever may have moved the
//! session on, so that no phase is missed whose time is kept.

use log::trace;

use crate::session::{Note, Phase};

use super::conn::{Client, Conn};
use super::meter::Went;
use super::report;

impl Conn {
    /// Has log and figures know what the session has come to.
    pub(super) fn notice(&mut self) {
        if let Some(metered) = &mut self.metered {
            metered.asked(&self.session);
        }
        while let Some(note) = self.session.poll_note() {
            report::note(&self.info, &note);
            if let (Note::HandoverFailed(failure), Some(metered)) = (note, &mut self.metered) {
                metered.failed(failure.step);
            }
        }
        let present = self.session.phase();
        if present != self.noticed {
            trace!("client={}: {} -> {}", self.info, self.noticed.name(), present.name());
            self.noticed = present;
            if let Some(metered) = &mut self.metered {
                metered.moved(&self.session);
            }
        }
    }

    /// Counts what has come and gone up to now, before it goes otherwise.
    pub(super) fn count_octets(&mut self) {
        let Some(metered) = &mut self.metered else { return };
        let went = match &self.client {
            Some(Client { leg: Some(_), .. }) => Went::Tls,
            _ if self.session.phase() == Phase::RelayTls
                || self.session.end().is_some() && self.session.ended_in() == Phase::RelayTls =>
            {
                Went::Raw
            }
            _ => Went::Plain,
        };
        metered.count(self.tally, went);
    }
}
