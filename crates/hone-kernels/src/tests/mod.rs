//! What the operators are held to: the plain twin, finite differences, other people's gradients,
//! and equal bytes for any number of threads.

mod bf16;
mod further;
mod gradients;
mod oracle;
mod quant;
mod rounded;
mod threads;
mod twins;
