//! Changes of inputs, for builds without a fuzzer: the same seed makes the same changes.

/// Words that parsers here look for.
const WORDS: &[&[u8]] = &[
    b"\0",
    b"\xff",
    b"\xff\xff\xff\xff",
    b"\x80",
    b"\n",
    b" ",
    b"\"",
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b",",
    b"/",
    b"..",
    b"*",
    b"**",
    b"&a ",
    b"*a",
    b"!!",
    b"---\n",
    b"%",
    b"#",
    b"${",
    b"${host.x}",
    b"secret://",
    b"null",
    b"true",
    b"-1",
    b"0",
    b"1e400",
    b"18446744073709551615",
    b"\\u0000",
    b"\\ud800",
    b"\x1b[2J",
    "\u{202e}".as_bytes(),
    "\u{9b}".as_bytes(),
    b"<script>",
    b"spiffe://",
    b"example.com",
    b"/agent/",
    b"/operator/",
    b"@",
    b"ssh-ed25519 ",
    b"sha256:",
    b"(default)",
];

/// Makes changes of inputs.
#[derive(Debug)]
pub struct Mutator(u64);

impl Mutator {
    /// The changes of this seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// SplitMix64.
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`; 0 if there is none.
    fn below(&mut self, end: usize) -> usize {
        let number = usize::try_from(self.next() >> 1).unwrap_or(usize::MAX);
        number.checked_rem(end).unwrap_or(0)
    }

    /// One of `inputs` with a few changes, at most `max_len` long.
    pub fn change(&mut self, inputs: &[Vec<u8>], max_len: usize) -> Vec<u8> {
        let chosen = self.below(inputs.len());
        let mut bytes = inputs.get(chosen).cloned().unwrap_or_default();
        for _ in 0..=self.below(4) {
            self.change_once(&mut bytes, inputs);
            bytes.truncate(max_len);
        }
        bytes
    }

    fn change_once(&mut self, bytes: &mut Vec<u8>, inputs: &[Vec<u8>]) {
        let at = self.below(bytes.len() + 1);
        let most = self.below(7);
        let length = self.below(1 << most) + 1;
        let until = (at + length).min(bytes.len());
        match self.below(8) {
            0 if at < bytes.len() => bytes[at] ^= 1 << self.below(8),
            1 if at < bytes.len() => bytes[at] = u8::try_from(self.below(256)).unwrap_or(0),
            2 => bytes.truncate(at),
            3 => drop(bytes.drain(at..until)),
            4 => {
                let again = bytes[at..until].to_vec();
                bytes.splice(at..at, again);
            }
            5 => {
                let other = self.below(inputs.len());
                let other = inputs.get(other).map_or(&[][..], Vec::as_slice);
                let from = self.below(other.len() + 1);
                let end = (from + length * 8).min(other.len());
                bytes.splice(at..until, other[from..end].iter().copied());
            }
            6 => {
                let word = WORDS[self.below(WORDS.len())];
                bytes.splice(at..until, word.iter().copied());
            }
            _ => {
                let word = WORDS[self.below(WORDS.len())];
                bytes.splice(at..at, word.iter().copied());
            }
        }
    }
}
