//! What a process has in its memory (proc(5): maps and mem). Of a process that is not dumpable only root may know.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use rustix::process::Pid;

/// What is at this address.
pub(crate) fn at(pid: Pid, address: u64, length: usize) -> Vec<u8> {
    let memory = File::open(format!("/proc/{}/mem", pid.as_raw_nonzero())).unwrap();
    let mut piece = vec![0; length];
    memory.read_exact_at(&mut piece, address).unwrap_or_else(|why| panic!("{address:#x}: {why}"));
    piece
}

/// All that the process can read of itself, one piece for each mapping.
pub(crate) fn of(pid: Pid) -> Vec<Vec<u8>> {
    let place = format!("/proc/{}", pid.as_raw_nonzero());
    let memory = File::open(format!("{place}/mem")).unwrap_or_else(|why| panic!("{place}/mem: {why}"));
    let maps = fs::read_to_string(format!("{place}/maps")).unwrap();
    let mut pieces = Vec::new();
    for map in maps.lines() {
        let (range, rest) = map.split_once(' ').unwrap();
        // The kernel's own pages can't be read so, and hold nothing of the process.
        if !rest.starts_with('r') || rest.contains("[v") {
            continue;
        }
        let (from, to) = range.split_once('-').unwrap();
        let [from, to] = [from, to].map(|edge| u64::from_str_radix(edge, 16).unwrap());
        let mut piece = vec![0; (to - from) as usize];
        memory.read_exact_at(&mut piece, from).unwrap_or_else(|why| panic!("{map}: {why}"));
        pieces.push(piece);
    }
    assert!(!pieces.is_empty(), "no readable memory: {maps}");
    pieces
}

/// How often `needle` is there.
pub(crate) fn count(memory: &[Vec<u8>], needle: &[u8]) -> usize {
    let first = needle[0];
    let in_piece = |piece: &Vec<u8>| {
        let starts = piece.iter().enumerate().filter(|&(_, &octet)| octet == first);
        starts.filter(|&(at, _)| piece[at..].starts_with(needle)).count()
    };
    memory.iter().map(in_piece).sum()
}
