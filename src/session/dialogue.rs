//! The order of replies: whatever is pipelined, each reply, the server's or ours, leaves in the order of its command.
//!
//! One dialogue serves the snoop (server: the child) and the gate (server: the backend). It owes a reply for every
//! command taken; a reply of ours waits in the same queue as the server's.
//! Rejected: answering at once and sorting later. Both closest peers answer NOOP and errors ahead of the server's replies.

use std::collections::VecDeque;

use crate::buffer::Buffer;
use crate::smtp::ehlo::{self, Edit};
use crate::smtp::line::Lines;
use crate::smtp::reply::{Code, Ours, Scanned, Scanner};

use super::end::EndReason;
use super::limits;

/// What a server was asked, as far as its reply is treated differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    /// Nothing: the greeting.
    Greeting,
    /// EHLO: the reply may be edited. The number finds it in the transcript.
    Ehlo(u32),
    /// Any other recorded command.
    Recorded(u32),
    /// A verb we do not know, sent alone.
    Unknown,
}

/// A reply owed to the client.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Owed {
    Servers(Asked),
    Ours(Ours),
    /// The session ends here, with that reason's farewell.
    End(EndReason),
}

/// What a piece of the server's speech meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// A part of a reply.
    Part,
    /// The whole of an owed reply.
    Answer(Asked, Code),
    /// A whole reply that nobody asked for.
    Unasked,
    /// The beginning of one where the server may speak only when asked. Nothing of it is passed on, and the dialogue is over.
    OutOfTurn,
    /// No SMTP.
    NotSmtp,
}

/// One dialogue, from its first octet to the hand-over. It is dropped there, and nothing of it is ever used again.
#[derive(Debug, Default)]
pub(super) struct Dialogue {
    /// What the client has sent and nobody has judged.
    pub(super) lines: Lines,
    owed: VecDeque<Owed>,
    scanner: Scanner,
    /// What has come and is not passed on: of an EHLO reply all, for the edited one leaves in one write; of any other
    /// line the code, until it is seen to be one.
    collected: Vec<u8>,
    /// A part of the server's present reply has been passed on.
    said: bool,
    /// The server may not speak unasked, but for a 421.
    only_when_asked: bool,
    line_start: usize,
    collecting: bool,
    last: Option<Code>,
    own_starttls: bool,
    was_edited: bool,
}

impl Dialogue {
    /// A dialogue that begins with the server's greeting.
    pub(super) fn with_greeting() -> Self {
        let mut dialogue = Self::default();
        dialogue.ask(Asked::Greeting);
        dialogue
    }

    /// A dialogue in which the server may speak only when asked, but for a 421.
    pub(super) fn only_when_asked() -> Self {
        Self { only_when_asked: true, ..Self::default() }
    }

    /// A command went to the server.
    pub(super) fn ask(&mut self, asked: Asked) {
        self.owed.push_back(Owed::Servers(asked));
        self.look_ahead();
    }

    /// A command is answered by us.
    pub(super) fn answer(&mut self, reply: Ours) {
        self.owed.push_back(Owed::Ours(reply));
    }

    /// The session ends when everything owed before is said.
    pub(super) fn end_in_turn(&mut self, reason: EndReason) {
        self.owed.push_back(Owed::End(reason));
    }

    /// Says what is ours and at the head of the queue, unless the server is inside a reply that nobody asked for. The
    /// reason, if the end has come.
    pub(super) fn settle(&mut self, out: &mut Buffer) -> Option<EndReason> {
        while self.may_speak() {
            match self.owed.front() {
                Some(Owed::Ours(reply)) => out.push(reply.octets()),
                Some(Owed::End(reason)) => return Some(reason.clone()),
                Some(Owed::Servers(_)) | None => return None,
            }
            self.advance();
        }
        None
    }

    /// Says, in order, what is ours among all that is owed: the server's replies can no longer be told apart.
    pub(super) fn give_up(&mut self, out: &mut Buffer) -> Option<EndReason> {
        self.pass_on(out);
        for owed in core::mem::take(&mut self.owed) {
            match owed {
                Owed::Ours(reply) => out.push(reply.octets()),
                Owed::End(reason) => return Some(reason),
                Owed::Servers(_) => {}
            }
        }
        None
    }

    /// Whether no reply is owed.
    pub(super) fn is_quiet(&self) -> bool {
        self.owed.is_empty()
    }

    /// Whether everything the client has sent is taken: replies may be owed, but nothing waits to be judged or sent.
    pub(super) fn is_taken(&mut self) -> bool {
        // What follows an unknown verb is not looked at: it may be relayed as it came, faults and all.
        if self.awaits_unknown() {
            return self.lines.is_empty();
        }
        self.lines.peek() == crate::smtp::line::Peek::Incomplete
    }

    /// Whether the next command may be taken.
    pub(super) fn may_take(&self) -> bool {
        let ending = matches!(self.owed.back(), Some(Owed::End(_)));
        let alone = matches!(self.owed.back(), Some(Owed::Servers(Asked::Unknown)));
        !ending && !alone && self.owed.len() < limits::REPLIES_OWED
    }

    /// Whether the greeting has not been given in full.
    pub(super) fn is_ungreeted(&self) -> bool {
        self.owed.front() == Some(&Owed::Servers(Asked::Greeting))
    }

    /// Whether the server has an unknown verb to answer.
    pub(super) fn awaits_unknown(&self) -> bool {
        self.owed.front() == Some(&Owed::Servers(Asked::Unknown))
    }

    /// Whether a reply of ours would stand between two whole replies.
    pub(super) fn may_speak(&self) -> bool {
        !self.said
    }

    /// Whether the server has said nothing since its last whole reply.
    pub(super) fn is_between_replies(&self) -> bool {
        !self.said && self.collected.is_empty()
    }

    /// Whether the server has begun a line, and it is not known yet what it says.
    pub(super) fn is_inside_code(&self) -> bool {
        !self.collecting && !self.collected.is_empty()
    }

    /// The code of the server's last whole reply.
    pub(super) fn last_code(&self) -> Option<Code> {
        self.last
    }

    /// Whether the server offered STARTTLS by itself in the last edited reply; asking takes the answer away.
    pub(super) fn take_own_starttls(&mut self) -> bool {
        core::mem::take(&mut self.own_starttls)
    }

    /// Whether an EHLO reply has been passed on as we want it; asking takes the answer away.
    pub(super) fn take_edited(&mut self) -> bool {
        core::mem::take(&mut self.was_edited)
    }

    /// Takes the server's octets up to the end of a line, passes them on to `out` (an EHLO reply edited, as a whole), and
    /// says how many were used and what they meant.
    pub(super) fn hear(&mut self, octets: &[u8], edit: Option<Edit>, out: &mut Buffer) -> (usize, Heard) {
        let (used, scanned) = self.scanner.scan(octets);
        self.collected.extend_from_slice(&octets[..used]);
        self.collecting = self.collecting && edit.is_some() && self.is_editable();
        let heard = match scanned {
            Scanned::NotSmtp => return (used, Heard::NotSmtp),
            Scanned::Inside | Scanned::Line(_) => Heard::Part,
            Scanned::Final(code) => {
                if self.collecting {
                    self.edit(edit, out);
                }
                self.last = Some(code);
                match self.owed.front() {
                    Some(Owed::Servers(asked)) => Heard::Answer(*asked, code),
                    Some(Owed::Ours(_) | Owed::End(_)) | None => Heard::Unasked,
                }
            }
        };
        if matches!(scanned, Scanned::Line(_)) {
            self.line_start = self.collected.len();
        }
        if !self.collecting && self.scanner.is_code_known() {
            let is_asked = matches!(self.owed.front(), Some(Owed::Servers(_)));
            if self.only_when_asked && !is_asked && !self.says_421() {
                return (used, Heard::OutOfTurn);
            }
            self.pass_on(out);
        }
        if matches!(scanned, Scanned::Final(_)) {
            self.said = false;
            if let Heard::Answer(..) = heard {
                self.advance();
            }
        }
        (used, heard)
    }

    /// Whether the reply that nobody asked for announces the end.
    fn says_421(&self) -> bool {
        self.collected.starts_with(b"421") || self.said
    }

    /// Gives back what memory holds nothing.
    pub(super) fn give_back(&mut self) {
        self.lines.give_back();
        if self.owed.is_empty() {
            self.owed = VecDeque::new();
        }
        if self.collected.is_empty() {
            self.collected = Vec::new();
        }
    }

    /// Passes on what is held back, as it came.
    pub(super) fn pass_on(&mut self, out: &mut Buffer) {
        self.said |= !self.collected.is_empty();
        out.push(&self.collected);
        self.collected.clear();
        self.line_start = 0;
    }

    /// Whether what is collected has not grown beyond all measure.
    fn is_editable(&self) -> bool {
        let line = self.collected.len() - self.line_start;
        self.collected.len() <= limits::EHLO_REPLY && line <= limits::EHLO_LINE
    }

    fn edit(&mut self, edit: Option<Edit>, out: &mut Buffer) {
        if let Some(edit) = edit {
            self.was_edited = ehlo::is_all_250(&self.collected);
            self.own_starttls = self.was_edited && ehlo::offers(&self.collected, "STARTTLS");
            ehlo::edit(&self.collected, edit, out.as_mut_vec());
            self.collected.clear();
            self.line_start = 0;
        }
    }

    /// The head of the queue is dealt with.
    fn advance(&mut self) {
        self.owed.pop_front();
        self.look_ahead();
    }

    /// An EHLO reply that is next is collected, unless it has begun already as one that nobody asked for.
    fn look_ahead(&mut self) {
        if !self.scanner.is_inside_reply() {
            self.collecting = matches!(self.owed.front(), Some(Owed::Servers(Asked::Ehlo(_))));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EDIT: Option<Edit> = Some(Edit { offer_starttls: true, hide_auth: false });

    /// Lets `server` be heard in pieces of `size`, settling in between, and returns what the client sees.
    fn seen(dialogue: &mut Dialogue, server: &[u8], size: usize) -> Vec<u8> {
        let mut out = Buffer::default();
        for mut piece in server.chunks(size) {
            while !piece.is_empty() {
                dialogue.settle(&mut out);
                let (used, _) = dialogue.hear(piece, EDIT, &mut out);
                piece = &piece[used..];
            }
            dialogue.settle(&mut out);
        }
        out.as_slice().to_vec()
    }

    #[test]
    fn our_replies_wait_their_turn() {
        for size in 1..40 {
            let mut dialogue = Dialogue::with_greeting();
            dialogue.ask(Asked::Recorded(1));
            dialogue.answer(Ours::BAD_OCTET);
            dialogue.ask(Asked::Ehlo(2));
            dialogue.answer(Ours::NO_PARAMETER);
            let seen = seen(&mut dialogue, b"220 hi\r\n250 one\r\n250 host\r\n", size);
            let expected = "220 hi\r\n250 one\r\n500 5.5.2 Bad octet in line\r\n250-host\r\n250 STARTTLS\r\n\
                            501 5.5.4 STARTTLS takes no parameter\r\n";
            assert_eq!(String::from_utf8_lossy(&seen), expected);
            assert!(dialogue.is_quiet());
        }
    }

    #[test]
    fn an_ehlo_reply_leaves_whole_or_not_at_all() {
        let (mut dialogue, mut out) = (Dialogue::default(), Buffer::default());
        dialogue.ask(Asked::Ehlo(1));
        dialogue.hear(b"250-host\r\n", EDIT, &mut out);
        dialogue.hear(b"250 SI", EDIT, &mut out);
        assert!(out.is_empty() && dialogue.may_speak());
        dialogue.hear(b"ZE\r\n", EDIT, &mut out);
        assert_eq!(out.as_slice(), b"250-host\r\n250-STARTTLS\r\n250 SIZE\r\n");
    }

    #[test]
    fn gives_up_on_an_ehlo_reply_beyond_all_measure() {
        for (line, count) in [(&[b'a'; limits::EHLO_LINE + 1][..], 1), (&[b'a'; 100][..], 1000)] {
            let reply: Vec<u8> = (0..count).flat_map(|_| [b"250-", line, b"\r\n"].concat()).collect();
            let reply = [&reply[..], b"250 end\r\n"].concat();
            let mut dialogue = Dialogue::default();
            dialogue.ask(Asked::Ehlo(1));
            assert_eq!(seen(&mut dialogue, &reply, 1000), reply);
            assert!(dialogue.is_quiet());
        }
    }

    #[test]
    fn passes_on_what_nobody_asked_for() {
        let (mut dialogue, mut out) = (Dialogue::default(), Buffer::default());
        assert_eq!(dialogue.hear(b"421 idle\r\n", EDIT, &mut out), (10, Heard::Unasked));
        assert_eq!(out.as_slice(), b"421 idle\r\n");
    }

    #[test]
    fn where_only_answers_are_heard_nothing_else_is_not_even_its_beginning() {
        let mut out = Buffer::default();
        for begun in [&b"250 "[..], b"250 he", b"250-he\r\n", b"220 hello\r\n"] {
            let mut dialogue = Dialogue::only_when_asked();
            assert_eq!(dialogue.hear(begun, None, &mut out), (begun.len(), Heard::OutOfTurn));
            assert!(out.is_empty());
        }
        let mut dialogue = Dialogue::only_when_asked();
        for (part, is_inside_code) in
            [(&b"42"[..], true), (b"1-i", false), (b"dle\r\n", false), (b"4", true), (b"21 bye", false)]
        {
            assert_eq!(dialogue.hear(part, None, &mut out), (part.len(), Heard::Part));
            assert_eq!(dialogue.is_inside_code(), is_inside_code);
        }
        assert_eq!(out.as_slice(), b"421-idle\r\n421 bye");
    }

    #[test]
    fn takes_no_more_commands_than_it_can_owe() {
        let mut dialogue = Dialogue::default();
        for n in 0..limits::REPLIES_OWED {
            assert!(dialogue.may_take(), "{n}");
            dialogue.ask(Asked::Recorded(1));
        }
        assert!(!dialogue.may_take());
    }
}
