//! Noise by document, and the code books of 8-bit states.

use crate::{Backend, CodeBook, rng};

/// Each document has the noise that it has alone, and no other has the same.
#[test]
fn noise_does_not_know_the_neighbours() {
    let (b, d, lens) = (crate::Cpu::new(), 5, [3, 1, 40]);
    let mut packed = b.zeros(44 * d);
    b.add_noise(&mut packed, d, &lens, 2.0, (7, 10));
    let packed = b.download(&packed);
    let mut start = 0;
    for (k, len) in lens.into_iter().enumerate() {
        let mut alone = b.zeros(len * d);
        b.add_noise(&mut alone, d, &[len], 2.0, (7, 10 + k as u64));
        let alone = b.download(&alone);
        assert_eq!(alone, packed[start * d..(start + len) * d]);
        let bound = 2.0 / ((len * d) as f32).sqrt();
        let largest = alone.iter().fold(0.0_f32, |top, x| top.max(x.abs()));
        assert!(largest <= bound && largest > 0.5 * bound, "{largest} of {bound}");
        assert_ne!(alone[..d], packed[(start + len) % 44 * d..][..d]);
        start += len;
    }
}

/// What is coded and decoded is off by no more than half the widest gap, and what a code stands for
/// has that code.
#[test]
fn code_books_are_dense_and_sorted() {
    for (book, least) in [(CodeBook::signed(), -0.992_968_74), (CodeBook::unsigned(), 0.0)] {
        assert!(book.values.windows(2).all(|pair| pair[0] < pair[1]));
        assert_eq!((book.values[0], book.values[255]), (least, 1.0));
        assert!(book.values.contains(&0.0));
        for (code, &value) in book.values.iter().enumerate() {
            assert_eq!(usize::from(book.code(value)), code);
        }
        for (i, &bound) in book.bounds.iter().enumerate() {
            assert_eq!(usize::from(book.code(bound)), i, "a midpoint takes the lower code");
            assert_eq!(usize::from(book.code(bound.next_up())), i + 1);
        }
        // The table that finds a code is a search among the midpoints.
        for i in 0..1_000_000 {
            let x = (2.0 * rng::uniform(3, i) - 1.0) * 10.0_f64.powf(-8.0 * rng::uniform(4, i));
            let expected = book.bounds.partition_point(|&bound| bound < x as f32);
            assert_eq!(usize::from(book.code(x as f32)), expected, "{x}");
        }
    }
}
