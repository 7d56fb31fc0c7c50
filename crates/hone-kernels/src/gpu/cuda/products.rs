//! Products of matrices by cuBLASLt.
//!
//! It is told of matrices column by column, and so a row-major one is its transpose: `Y = A B` is asked
//! for as `Yt = Bt At`. The algorithm for a shape is looked for once and kept, so that the same product has the
//! same bytes whenever it is asked for.

use std::collections::HashMap;
use std::ffi::c_void;

use cudarc::cublaslt::result as lt;
use cudarc::cublaslt::sys::{
    cublasComputeType_t::CUBLAS_COMPUTE_32F, cublasLtHandle_t, cublasLtMatmulAlgo_t,
    cublasLtMatmulDesc_t, cublasLtMatmulDescAttributes_t as DescAttribute,
    cublasLtMatmulPreferenceAttributes_t as Preference, cublasLtMatrixLayout_t, cudaDataType_t,
};
use cudarc::driver::result;
use cudarc::driver::sys::CUstream;

use super::super::device::{Matrix, Product};
use crate::{Compute, Op};

/// Scratch memory that cuBLASLt may use; NVIDIA's advice for Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;

/// Largest alignment that algorithms ask for.
const ALIGNMENT_MAX: u64 = 16;

/// What an algorithm was chosen for.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    sides: (usize, usize, usize),
    ops: (bool, bool),
    strides: [usize; 4],
    alignments: [u32; 4],
    dtypes: (Compute, Compute),
    in_place: bool,
    adds: bool,
}

/// What cuBLASLt knows of a product.
#[derive(Clone, Copy)]
struct Plan {
    desc: cublasLtMatmulDesc_t,
    /// Of Bt, At, Ct and Yt.
    layouts: [cublasLtMatrixLayout_t; 4],
    algo: cublasLtMatmulAlgo_t,
}

/// The products of one stream.
pub(super) struct Products {
    handle: cublasLtHandle_t,
    stream: CUstream,
    workspace: u64,
    plans: HashMap<Key, Plan>,
}

fn dtype(holds: Compute) -> cudaDataType_t {
    match holds {
        Compute::F32 => cudaDataType_t::CUDA_R_32F,
        Compute::Bf16 => cudaDataType_t::CUDA_R_16BF,
    }
}

/// `cublasOperation_t`.
fn operation(op: Op) -> i32 {
    match op {
        Op::N => 0,
        Op::T => 1,
    }
}

/// The largest power of two, up to a limit, that the address is a multiple of.
fn alignment(address: u64) -> u32 {
    let align = 1_u64 << address.trailing_zeros().min(ALIGNMENT_MAX.trailing_zeros());
    u32::try_from(align).expect("at most 16")
}

impl Products {
    /// Its handle and scratch memory.
    pub(super) fn new(stream: CUstream) -> Result<Self, super::CudaError> {
        let handle = lt::create_handle()
            .map_err(|error| super::CudaError::Driver(format!("cuBLASLt: {:?}", error.0)))?;
        // SAFETY: the stream lives as long as we do.
        let workspace = unsafe { result::malloc_async(stream, WORKSPACE_BYTES) }?;
        Ok(Products { handle, stream, workspace, plans: HashMap::new() })
    }

    /// Runs `product`; says what fails.
    ///
    /// # Safety
    ///
    /// Its matrices must lie in memory of the stream's device.
    pub(super) unsafe fn run(&mut self, product: &Product) -> Result<(), String> {
        let Product { a, b, c, y, sides, factors: (alpha, beta), .. } = *product;
        let plan =
            self.plan(product).map_err(|error| format!("a product of {sides:?}: {error}"))?;
        let at = |x: Matrix| x.address as *const c_void;
        // SAFETY: the plan is that of these matrices; the caller's for the rest.
        let done = unsafe {
            lt::matmul(
                self.handle,
                plan.desc,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                at(b.0),
                plan.layouts[0],
                at(a.0),
                plan.layouts[1],
                at(if beta == 0.0 { y } else { c }),
                plan.layouts[2],
                y.address as *mut c_void,
                plan.layouts[3],
                &raw const plan.algo,
                self.workspace as *mut c_void,
                WORKSPACE_BYTES,
                self.stream.cast(),
            )
        };
        done.map_err(|error| format!("a product of {sides:?}: {:?}", error.0))
    }

    /// What is known of the product, or found out now.
    fn plan(&mut self, product: &Product) -> Result<Plan, String> {
        let Product { a, b, c, y, sides, inputs, output, factors: (_, beta) } = *product;
        let adds = beta != 0.0;
        let c = if adds { c } else { y };
        let all = [b.0, a.0, c, y];
        let key = Key {
            sides,
            ops: (a.1 == Op::T, b.1 == Op::T),
            strides: all.map(|x| x.stride),
            alignments: all.map(|x| alignment(x.address)),
            dtypes: (inputs, output),
            in_place: c.address == y.address,
            adds,
        };
        if let Some(plan) = self.plans.get(&key) {
            return Ok(*plan);
        }
        // SAFETY: what is made here is given to calls that take it, and kept as long as the handle.
        let plan = unsafe { self.made(&key, (a.1, b.1)) }.map_err(|e| format!("{:?}", e.0))?;
        self.plans.insert(key, plan);
        Ok(plan)
    }

    /// # Safety
    ///
    /// The handle must be good.
    unsafe fn made(&self, key: &Key, (op_a, op_b): (Op, Op)) -> Result<Plan, lt::CublasError> {
        let (m, n, k) = key.sides;
        let (inputs, output) = (dtype(key.dtypes.0), dtype(key.dtypes.1));
        // Rows and columns as they lie, column by column.
        let turned = |op, rows, cols| if op == Op::N { (cols, rows) } else { (rows, cols) };
        let shapes = [turned(op_b, k, n), turned(op_a, m, k), (n, m), (n, m)];
        let dtypes = [inputs, inputs, output, output];
        let mut layouts = [std::ptr::null_mut(); 4];
        for (i, layout) in layouts.iter_mut().enumerate() {
            let (rows, cols) = shapes[i];
            let stride = key.strides[i].max(rows).max(1) as i64;
            *layout = lt::create_matrix_layout(dtypes[i], rows as u64, cols as u64, stride)?;
        }
        let desc = lt::create_matmul_desc(CUBLAS_COMPUTE_32F, cudaDataType_t::CUDA_R_32F)?;
        let set = |attribute, op: Op| {
            let op = operation(op);
            // SAFETY: the description was just made; the attribute is such a value.
            unsafe {
                let size = size_of_val(&op);
                lt::set_matmul_desc_attribute(desc, attribute, (&raw const op).cast(), size)
            }
        };
        set(DescAttribute::CUBLASLT_MATMUL_DESC_TRANSA, op_b)?;
        set(DescAttribute::CUBLASLT_MATMUL_DESC_TRANSB, op_a)?;
        // SAFETY: the caller's, and all descriptions were just made.
        let found = unsafe { self.heuristic(desc, layouts, key.alignments) }?;
        Ok(Plan { desc, layouts, algo: found })
    }

    /// The algorithm that cuBLASLt takes for the fastest.
    ///
    /// # Safety
    ///
    /// As for [`Products::made`].
    unsafe fn heuristic(
        &self,
        desc: cublasLtMatmulDesc_t,
        layouts: [cublasLtMatrixLayout_t; 4],
        alignments: [u32; 4],
    ) -> Result<cublasLtMatmulAlgo_t, lt::CublasError> {
        let preference = lt::create_matmul_pref()?;
        let sizes = [
            Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ];
        // SAFETY: the preference was just made, and each attribute has the size that it is said to have;
        // the caller's for the rest.
        unsafe {
            let bytes = WORKSPACE_BYTES as u64;
            lt::set_matmul_pref_attribute(
                preference,
                Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const bytes).cast(),
                size_of_val(&bytes),
            )?;
            for (attribute, align) in sizes.into_iter().zip(&alignments) {
                let at = std::ptr::from_ref(align).cast();
                lt::set_matmul_pref_attribute(preference, attribute, at, size_of_val(align))?;
            }
            let [b, a, c, y] = layouts;
            let found = lt::get_matmul_algo_heuristic(self.handle, desc, b, a, c, y, preference);
            lt::destroy_matmul_pref(preference)?;
            Ok(found?.algo)
        }
    }
}

impl Drop for Products {
    fn drop(&mut self) {
        // What fails now has nobody to hear of it.
        // SAFETY: all were made by us, and nobody has them any more.
        unsafe {
            for plan in self.plans.values() {
                let _ = lt::destroy_matmul_desc(plan.desc);
                for layout in plan.layouts {
                    let _ = lt::destroy_matrix_layout(layout);
                }
            }
            let _ = result::free_async(self.workspace, self.stream);
            let _ = lt::destroy_handle(self.handle);
        }
    }
}
