//! Transposes of squares of vectors.
#![cfg(target_arch = "x86_64")]

use std::arch::x86_64::*;

/// Lane j of vector i becomes lane i of vector j: pairs of rows, then quarters, then halves are
/// interleaved.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn square(x: &mut [__m512; 16]) {
    let mut two = *x;
    for i in (0..16).step_by(2) {
        two[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
        two[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
    // Afterwards quarter q of `x[4 i + j]` is column 4 q + j of rows 4 i to 4 i + 3.
    for i in (0..16).step_by(4) {
        for half in 0..2 {
            let a = _mm512_castps_pd(two[i + half]);
            let b = _mm512_castps_pd(two[i + half + 2]);
            x[i + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            x[i + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    }
    for j in 0..4 {
        let columns = quarters([x[j], x[j + 4], x[j + 8], x[j + 12]]);
        for (k, column) in columns.into_iter().enumerate() {
            x[j + 4 * k] = column;
        }
    }
}

/// Quarter j of vector i becomes quarter i of vector j.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn quarters([a, b, c, d]: [__m512; 4]) -> [__m512; 4] {
    const EVEN: i32 = 0b10_00_10_00;
    const ODD: i32 = 0b11_01_11_01;
    let even = [_mm512_shuffle_f32x4::<EVEN>(a, b), _mm512_shuffle_f32x4::<EVEN>(c, d)];
    let odd = [_mm512_shuffle_f32x4::<ODD>(a, b), _mm512_shuffle_f32x4::<ODD>(c, d)];
    [
        _mm512_shuffle_f32x4::<EVEN>(even[0], even[1]),
        _mm512_shuffle_f32x4::<EVEN>(odd[0], odd[1]),
        _mm512_shuffle_f32x4::<ODD>(even[0], even[1]),
        _mm512_shuffle_f32x4::<ODD>(odd[0], odd[1]),
    ]
}
