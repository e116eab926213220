//! A seccomp filter from a list of system calls: classic BPF, a binary search over the numbers.
//!
//! Contract: a call that is not in the list is refused with EPERM; of arguments the low 32 bits are looked at, which is all that
//! the kernel looks at in those that are named in `sandbox`; a call of another architecture kills.
//!
//! Rejected: the crate seccompiler. It tests the numbers one after the other, and such a program took 65 us to make and 200 us of
//! the kernel's for every session; this one takes 35 and 50.

use nix::libc::{
    self, BPF_ABS, BPF_ALU, BPF_AND, BPF_JEQ, BPF_JGE, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, sock_filter,
};

/// What becomes of a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Rule {
    /// It is made.
    Allow,
    /// It fails with this error.
    Refuse(i32),
    /// The process dies of SIGSYS.
    Kill,
    /// It is made if all of these hold.
    If(Vec<Test>, Otherwise),
}

/// What becomes of a call whose arguments don't hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Otherwise {
    /// It fails with EPERM.
    Refuse,
    /// The process dies of SIGSYS.
    Kill,
}

/// An argument, under a mask, must be one of these.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Test {
    pub(super) argument: u8,
    pub(super) mask: u32,
    pub(super) values: Vec<u32>,
}

/// What the kernel calls this architecture (linux/audit.h), as far as we have tried it.
const ARCHITECTURE: Option<u32> = if cfg!(target_arch = "x86_64") {
    Some(0xc000_003e)
} else if cfg!(target_arch = "aarch64") {
    Some(0xc000_00b7)
} else {
    None
};

// Where struct seccomp_data (linux/seccomp.h) has the number, the architecture and the low half of the first argument.
const NUMBER: u32 = 0;
const ARCHITECTURE_WORD: u32 = 4;
const ARGUMENTS: u32 = 16;

const UNLISTED: Rule = Rule::Refuse(libc::EPERM);

/// The program for these calls, each named once.
///
/// The kernel translates every instruction, at 0.2 us each: so a range costs one, and all answers stand once, at the end. `None`:
/// they are too far away for the eight bits of a jump, or the architecture is not known.
pub(super) fn program(mut calls: Vec<(libc::c_long, Rule)>) -> Option<Vec<sock_filter>> {
    let architecture = ARCHITECTURE?;
    calls.sort_by_key(|(number, _)| *number);
    let mut ranges = Vec::with_capacity(2 * calls.len() + 1);
    let mut next = 0;
    for (number, rule) in &calls {
        let number = u32::try_from(*number).ok()?;
        if number > next {
            add(&mut ranges, next, &UNLISTED);
        }
        add(&mut ranges, number, rule);
        next = number + 1;
    }
    add(&mut ranges, next, &UNLISTED);

    let mut code = Code { steps: Vec::with_capacity(256), jumps: Vec::with_capacity(256) };
    // Nobody looks at it. But the kernel, which would try the program with each number that there is, to learn for which it need
    // not be run, gives that up at an argument: 20 us less for a session; that each call is then asked about can't be measured.
    code.steps.push(load(ARGUMENTS));
    code.steps.push(load(ARCHITECTURE_WORD));
    code.branch(BPF_JEQ, architecture, To::Next, To::Answer(libc::SECCOMP_RET_KILL_PROCESS));
    code.steps.push(load(NUMBER));
    code.search(&ranges);
    code.finish()
}

/// A range begins, unless it goes on as before.
fn add<'a>(ranges: &mut Vec<(u32, &'a Rule)>, from: u32, rule: &'a Rule) {
    if ranges.last().is_none_or(|(_, last)| *last != rule) {
        ranges.push((from, rule));
    }
}

/// Where a branch leads.
#[derive(Clone, Copy)]
enum To {
    Next,
    Step(usize),
    Answer(u32),
}

/// Instructions, and the branches among them whose distances are not known yet.
struct Code {
    steps: Vec<sock_filter>,
    jumps: Vec<(usize, To, To)>,
}

impl Code {
    fn branch(&mut self, how: u32, k: u32, then: To, otherwise: To) {
        self.jumps.push((self.steps.len(), then, otherwise));
        self.steps.push(statement(BPF_JMP | how | BPF_K, k));
    }

    /// Finds the range of the number, among two or more.
    fn search(&mut self, ranges: &[(u32, &Rule)]) {
        let (lower, upper) = ranges.split_at(ranges.len() / 2);
        let (here, jump) = (self.steps.len(), self.jumps.len());
        let Some((from, _)) = upper.first() else { return };
        self.branch(BPF_JGE, *from, To::Next, To::Next);
        let otherwise = self.side(lower);
        let then = self.side(upper);
        self.jumps[jump] = (here, then, otherwise);
    }

    /// What to do for these ranges, and where that stands.
    fn side(&mut self, ranges: &[(u32, &Rule)]) -> To {
        let here = To::Step(self.steps.len());
        match ranges {
            [(_, Rule::Allow)] => return To::Answer(libc::SECCOMP_RET_ALLOW),
            [(_, Rule::Refuse(error))] => return refusal(*error),
            [(_, Rule::Kill)] => return To::Answer(libc::SECCOMP_RET_KILL_PROCESS),
            [(_, Rule::If(tests, otherwise))] => self.tests(tests, *otherwise),
            more => self.search(more),
        }
        here
    }

    fn tests(&mut self, tests: &[Test], otherwise: Otherwise) {
        let failed = match otherwise {
            Otherwise::Refuse => refusal(libc::EPERM),
            Otherwise::Kill => To::Answer(libc::SECCOMP_RET_KILL_PROCESS),
        };
        for (test, left) in tests.iter().zip((0..tests.len()).rev()) {
            self.steps.push(load(ARGUMENTS + 8 * u32::from(test.argument)));
            if test.mask != u32::MAX {
                self.steps.push(statement(BPF_ALU | BPF_AND | BPF_K, test.mask));
            }
            let behind = self.steps.len() + test.values.len().max(1);
            let passed = if left == 0 { To::Answer(libc::SECCOMP_RET_ALLOW) } else { To::Step(behind) };
            match test.values.split_last() {
                Some((last, others)) => {
                    others.iter().for_each(|value| self.branch(BPF_JEQ, *value, passed, To::Next));
                    self.branch(BPF_JEQ, *last, passed, failed);
                }
                // Nothing is allowed.
                None => self.branch(BPF_JEQ, 0, failed, failed),
            }
        }
    }

    /// Puts the answers behind and the distances in.
    fn finish(mut self) -> Option<Vec<sock_filter>> {
        let mut answers: Vec<(u32, usize)> = Vec::new();
        for (here, then, otherwise) in self.jumps {
            let mut distance = |to| {
                let there = match to {
                    To::Next => here + 1,
                    To::Step(there) => there,
                    To::Answer(answer) => match answers.iter().find(|(known, _)| *known == answer) {
                        Some((_, there)) => *there,
                        None => {
                            answers.push((answer, self.steps.len()));
                            self.steps.push(statement(BPF_RET | BPF_K, answer));
                            self.steps.len() - 1
                        }
                    },
                };
                u8::try_from(there - here - 1).ok()
            };
            let (jt, jf) = (distance(then)?, distance(otherwise)?);
            let step = &mut self.steps[here];
            (step.jt, step.jf) = (jt, jf);
        }
        Some(self.steps)
    }
}

fn load(offset: u32) -> sock_filter {
    statement(BPF_LD | BPF_W | BPF_ABS, offset)
}

fn refusal(error: i32) -> To {
    To::Answer(libc::SECCOMP_RET_ERRNO | error.unsigned_abs())
}

/// Every instruction's code is an octet.
fn statement(code: u32, k: u32) -> sock_filter {
    sock_filter { code: u16::from(code.to_le_bytes()[0]), jt: 0, jf: 0, k }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
    const KILL: u32 = libc::SECCOMP_RET_KILL_PROCESS;
    const REFUSE: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;

    /// What the kernel would answer: the instructions of above, by bpf(4).
    fn answer_to(code: &[sock_filter], architecture: u32, number: u32, arguments: [u64; 6]) -> u32 {
        let mut data = [number.to_le_bytes(), architecture.to_le_bytes(), [0; 4], [0; 4]].concat();
        arguments.iter().for_each(|argument| data.extend(argument.to_le_bytes()));
        let (mut at, mut a) = (0, 0);
        loop {
            let i = code[at];
            at += 1;
            let (operation, k) = (u32::from(i.code), i.k as usize);
            let branch = |holds: bool| usize::from(if holds { i.jt } else { i.jf });
            if operation == BPF_LD | BPF_W | BPF_ABS {
                a = u32::from_le_bytes(data[k..k + 4].try_into().unwrap());
            } else if operation == BPF_ALU | BPF_AND | BPF_K {
                a &= i.k;
            } else if operation == BPF_JMP | BPF_JEQ | BPF_K {
                at += branch(a == i.k);
            } else if operation == BPF_JMP | BPF_JGE | BPF_K {
                at += branch(a >= i.k);
            } else if operation == BPF_RET | BPF_K {
                return i.k;
            } else {
                panic!("instruction {operation:#x}");
            }
        }
    }

    #[test]
    fn each_number_gets_its_own_answer() {
        let calls: Vec<_> = (3..460)
            .filter(|number| number % 5 == 0)
            .map(|number| (number, if number % 3 == 0 { Rule::Kill } else { Rule::Allow }))
            .collect();
        let code = program(calls.clone()).unwrap();
        for number in (0..1200).chain([0x4000_003b, u32::MAX - 1, u32::MAX]) {
            let expected = match calls.iter().find(|(listed, _)| *listed == i64::from(number)) {
                Some((_, Rule::Allow)) => ALLOW,
                Some(_) => KILL,
                None => REFUSE,
            };
            assert_eq!(answer_to(&code, ARCHITECTURE.unwrap(), number, [0; 6]), expected, "{number}");
        }
    }

    #[test]
    fn a_program_too_long_for_its_jumps_is_none() {
        let calls: Vec<_> = (0..1000).step_by(2).map(|number| (number, Rule::Allow)).collect();
        assert!(program(calls).is_none());
    }

    #[test]
    fn another_architecture_kills() {
        let code = program(vec![(1, Rule::Allow)]).unwrap();
        assert_eq!(answer_to(&code, ARCHITECTURE.unwrap(), 1, [0; 6]), ALLOW);
        assert_eq!(answer_to(&code, 0x4000_0003, 1, [0; 6]), KILL, "32 bits");
    }

    #[test]
    fn all_tests_of_arguments_must_hold() {
        let tests = vec![
            Test { argument: 0, mask: u32::MAX, values: vec![2, 10, 11] },
            Test { argument: 5, mask: 0xf, values: vec![1] },
        ];
        let none = Rule::If(vec![Test { argument: 0, mask: u32::MAX, values: vec![] }], Otherwise::Refuse);
        let calls =
            vec![(4, Rule::Allow), (5, Rule::If(tests, Otherwise::Kill)), (6, Rule::Refuse(libc::ENOSYS)), (7, none)];
        let code = program(calls).unwrap();
        let answer = |first, last| answer_to(&code, ARCHITECTURE.unwrap(), 5, [first, 0, 0, 0, 0, last]);
        for first in [2, 10, 11] {
            assert_eq!(answer(first, 0x801), ALLOW);
            assert_eq!(answer(first, 2), KILL);
        }
        assert_eq!((answer(1, 1), answer(12, 1)), (KILL, KILL));
        assert_eq!(answer_to(&code, ARCHITECTURE.unwrap(), 4, [9; 6]), ALLOW);
        assert_eq!(answer_to(&code, ARCHITECTURE.unwrap(), 7, [0; 6]), REFUSE);
        assert_eq!(answer_to(&code, ARCHITECTURE.unwrap(), 6, [2; 6]), libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32);
    }
}
