//! A GPU of NVIDIA's, through its driver and cuBLASLt.
//!
//! Both libraries are looked for when the first device is opened, so that a program with this feature
//! runs where they are missing, and says so. All work goes to one stream of the device's own; memory comes from
//! the device's pool, which keeps what is freed.

#![allow(unsafe_code, reason = "the driver is called through pointers")]

mod products;

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{
    CUcontext, CUdevice_attribute_enum as DeviceAttribute, CUfunction,
    CUfunction_attribute_enum as Attribute, CUmemPool_attribute_enum as PoolAttribute, CUmodule,
    CUstream, is_culib_present,
};

use super::device::{Arg, Device, Launch, Product};
use products::Products;

/// The kernels, as `build.rs` compiled them: the name of each file, and its machine code.
mod machine_code {
    include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
}

/// The least compute capability that the kernels are compiled for.
const CAPABILITY_MIN: (i32, i32) = (8, 0);

/// Why a device cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CudaError {
    /// The driver's library is not there.
    NoDriver,
    /// Matrix products need a library that is not there.
    NoCublas,
    /// The driver is there and finds no device of this number, of so many.
    NoDevice(usize, usize),
    /// The device is older than the kernels: its name and its compute capability.
    TooOld(String, (i32, i32)),
    /// The driver is older than the kernels' toolkit, or knows none of their machine code.
    OldDriver(String),
    /// A file of kernels that was asked for cannot be used.
    Kernels(String),
    /// What else the driver says.
    Driver(String),
}

impl std::fmt::Display for CudaError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            CudaError::NoDriver => {
                write!(f, "there is no driver of NVIDIA's: libcuda.so.1 cannot be opened")
            }
            CudaError::NoCublas => {
                write!(f, "libcublasLt.so.13 cannot be opened; it comes with CUDA 13")
            }
            CudaError::NoDevice(ordinal, n) => {
                write!(f, "there is no device cuda:{ordinal}: the driver finds {n}")
            }
            CudaError::TooOld(name, (major, minor)) => {
                write!(
                    f,
                    "{name} has compute capability {major}.{minor}, and kernels need {}.{}",
                    CAPABILITY_MIN.0, CAPABILITY_MIN.1
                )
            }
            CudaError::OldDriver(what) => write!(
                f,
                "the driver does not take the kernels ({what}); it must be that of CUDA 13, 580 or later"
            ),
            CudaError::Kernels(what) => write!(f, "HONE_KERNELS: {what}"),
            CudaError::Driver(what) => write!(f, "{what}"),
        }
    }
}

impl std::error::Error for CudaError {}

impl From<DriverError> for CudaError {
    fn from(error: DriverError) -> Self {
        CudaError::Driver(said(&error))
    }
}

/// What the driver says, in a line.
fn said(error: &DriverError) -> String {
    let text = |x: Result<&std::ffi::CStr, _>| x.map(|x| x.to_string_lossy().into_owned()).ok();
    let name = text(error.error_name()).unwrap_or_else(|| format!("{:?}", error.0));
    match text(error.error_string()) {
        Some(what) => format!("{name}: {what}"),
        None => name,
    }
}

/// A device.
#[derive(Clone)]
pub struct Cuda(Arc<Inner>);

impl std::fmt::Debug for Cuda {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "cuda:{} ({})", self.0.ordinal, self.0.device_name)
    }
}

struct Inner {
    ordinal: usize,
    device_name: String,
    capability: (i32, i32),
    device: i32,
    context: CUcontext,
    stream: CUstream,
    modules: Vec<CUmodule>,
    kernels: Mutex<HashMap<String, Kernel>>,
    /// Until the device is given back.
    products: Mutex<Option<Products>>,
    fault: Mutex<Option<String>>,
}

// SAFETY: the driver takes its handles from any thread; what we change lies behind locks.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

/// A loaded kernel.
#[derive(Clone, Copy)]
struct Kernel {
    function: CUfunction,
    threads: u32,
    /// Bytes that its blocks may share by size.
    shared_bytes: u32,
}

/// Bytes that a block may share by size without being asked for.
const SHARED_BYTES_FREE: u32 = 48 << 10;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Cuda {
    /// Opens device number `ordinal`. Errors: no driver, no such device, one that is too old.
    pub fn open(ordinal: usize) -> Result<Self, CudaError> {
        // SAFETY: it opens a library by name.
        if !unsafe { is_culib_present() } {
            return Err(CudaError::NoDriver);
        }
        // SAFETY: as above.
        if !unsafe { cudarc::cublaslt::sys::is_culib_present() } {
            return Err(CudaError::NoCublas);
        }
        let n = match result::init().and_then(|()| result::device::get_count()) {
            Ok(n) => usize::try_from(n).unwrap_or(0),
            Err(error) if error.0 == cudarc::driver::sys::CUresult::CUDA_ERROR_NO_DEVICE => 0,
            Err(error) => return Err(error.into()),
        };
        if ordinal >= n {
            return Err(CudaError::NoDevice(ordinal, n));
        }
        let device = result::device::get(i32::try_from(ordinal).expect("below the count"))?;
        let device_name = result::device::get_name(device)?;
        let capability = capability(device)?;
        if capability < CAPABILITY_MIN {
            return Err(CudaError::TooOld(device_name, capability));
        }
        // SAFETY: the device was given by the driver; its primary context lives as long as we do.
        let (context, stream) = unsafe {
            let context = result::primary_ctx::retain(device)?;
            result::ctx::set_current(context)?;
            keep_freed_memory(device)?;
            (context, result::stream::create(result::stream::StreamKind::NonBlocking)?)
        };
        let inner = Inner {
            ordinal,
            device_name,
            capability,
            device,
            context,
            stream,
            modules: modules()?,
            kernels: Mutex::default(),
            products: Mutex::new(Some(Products::new(stream)?)),
            fault: Mutex::default(),
        };
        Ok(Cuda(Arc::new(inner)))
    }

    /// Devices that the driver finds; 0 without a driver.
    pub fn count() -> usize {
        // SAFETY: it opens a library by name.
        if !unsafe { is_culib_present() } {
            return 0;
        }
        let count = result::init().and_then(|()| result::device::get_count());
        count.ok().and_then(|n| usize::try_from(n).ok()).unwrap_or(0)
    }

    /// The device's own name.
    pub fn device_name(&self) -> &str {
        &self.0.device_name
    }

    /// Its compute capability.
    pub fn capability(&self) -> (i32, i32) {
        self.0.capability
    }

    /// Bytes of the device's memory that nobody has, and all of them.
    pub fn memory(&self) -> Result<(usize, usize), CudaError> {
        self.0.here()?;
        Ok(result::mem_get_info()?)
    }

    /// Waits until all work has been done.
    pub fn synchronize(&self) {
        self.0.attempt("waiting", |inner| {
            // SAFETY: the stream lives as long as we do.
            unsafe { result::stream::synchronize(inner.stream) }
        });
    }
}

fn capability(device: i32) -> Result<(i32, i32), DriverError> {
    use DeviceAttribute::{
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
    };
    // SAFETY: the device was given by the driver.
    unsafe {
        let get = |attribute| result::device::get_attribute(device, attribute);
        Ok((get(MAJOR)?, get(MINOR)?))
    }
}

/// Has the pool keep what is freed: it would otherwise be given back whenever somebody waits.
///
/// # Safety
///
/// The device must be one of the driver's.
unsafe fn keep_freed_memory(device: i32) -> Result<(), DriverError> {
    let mut all = u64::MAX;
    // SAFETY: the caller's; the attribute is a u64.
    unsafe {
        let pool = result::device::get_default_mem_pool(device)?;
        let threshold = PoolAttribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        result::mem_pool::set_attribute(pool, threshold, (&raw mut all).cast())
    }
}

/// The kernels, and before them those of the file that `HONE_KERNELS` names.
fn modules() -> Result<Vec<CUmodule>, CudaError> {
    let mut modules = Vec::new();
    if let Some(path) = std::env::var_os("HONE_KERNELS") {
        let path = CString::new(Path::new(&path).as_os_str().as_encoded_bytes())
            .map_err(|_| CudaError::Kernels("a path without zeros is wanted".to_owned()))?;
        let loaded = result::module::load(path.clone());
        modules.push(loaded.map_err(|error| {
            CudaError::Kernels(format!("{}: {}", path.to_string_lossy(), said(&error)))
        })?);
    }
    for (name, image) in machine_code::KERNELS {
        // SAFETY: the image is what nvcc made, and stays where it is.
        let loaded = unsafe { result::module::load_data(image.as_ptr().cast()) };
        let module =
            loaded.map_err(|error| CudaError::OldDriver(format!("{name}: {}", said(&error))))?;
        modules.push(module);
    }
    Ok(modules)
}

impl Inner {
    /// Makes the device that of the calling thread.
    fn here(&self) -> Result<(), DriverError> {
        // SAFETY: the context lives as long as we do.
        unsafe { result::ctx::set_current(self.context) }
    }

    /// Does something on the device unless something has failed before; remembers what fails.
    fn attempt<T>(
        &self,
        what: &str,
        run: impl FnOnce(&Self) -> Result<T, DriverError>,
    ) -> Option<T> {
        if lock(&self.fault).is_some() {
            return None;
        }
        match self.here().and_then(|()| run(self)) {
            Ok(value) => Some(value),
            Err(error) => {
                self.fail(format!("{what}: {}", said(&error)));
                None
            }
        }
    }

    /// Remembers what failed first.
    fn fail(&self, what: String) {
        lock(&self.fault).get_or_insert(what);
    }

    /// The kernel of this name, which may share so many bytes.
    fn kernel(&self, name: &str, shared_bytes: u32) -> Result<Kernel, DriverError> {
        let mut kernels = lock(&self.kernels);
        if let Some(kernel) = kernels.get(name)
            && shared_bytes <= kernel.shared_bytes
        {
            return Ok(*kernel);
        }
        let function = self.function(name)?;
        let threads = Attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK;
        let shared = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function was given by the driver.
        let threads = unsafe {
            if shared_bytes > SHARED_BYTES_FREE {
                let bytes = i32::try_from(shared_bytes).expect("less than a block can share");
                result::function::set_function_attribute(function, shared, bytes)?;
            }
            // The number that its launch bounds name.
            result::function::get_function_attribute(function, threads)?
        };
        let threads = u32::try_from(threads).expect("a positive number of threads");
        let kernel =
            Kernel { function, threads, shared_bytes: shared_bytes.max(SHARED_BYTES_FREE) };
        kernels.insert(name.to_owned(), kernel);
        Ok(kernel)
    }

    /// A function of the first module that has it.
    fn function(&self, name: &str) -> Result<CUfunction, DriverError> {
        let mut last = None;
        for &module in &self.modules {
            let name = CString::new(name).expect("names of kernels have no zeros");
            // SAFETY: the module was loaded.
            match unsafe { result::module::get_function(module, name) } {
                Ok(function) => return Ok(function),
                Err(error) => last = Some(error),
            }
        }
        Err(last.expect("there are modules"))
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // What fails now has nobody to hear of it.
        // SAFETY: all were given by the driver, and nobody has them any more.
        unsafe {
            let _ = result::ctx::set_current(self.context);
            let _ = result::stream::synchronize(self.stream);
            // Their scratch memory goes back to the stream.
            drop(lock(&self.products).take());
            for &module in &self.modules {
                let _ = result::module::unload(module);
            }
            let _ = result::stream::destroy(self.stream);
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

/// Memory of a device.
pub struct Memory {
    address: u64,
    bytes: usize,
    device: Cuda,
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.address != 0 && self.device.0.here().is_ok() {
            // SAFETY: it came from this stream's pool, and is freed once all work before has been done.
            let _ = unsafe { result::free_async(self.address, self.device.0.stream) };
        }
    }
}

impl Device for Cuda {
    type Memory = Memory;

    fn name(&self) -> &'static str {
        "cuda"
    }

    fn alloc(&self, bytes: usize) -> Memory {
        let memory = self.alloc_unset(bytes);
        if memory.address != 0 && bytes > 0 {
            self.0.attempt("memory", |inner| {
                // SAFETY: so many bytes were taken.
                unsafe { result::memset_d8_async(memory.address, 0, bytes, inner.stream) }
            });
        }
        memory
    }

    fn alloc_unset(&self, bytes: usize) -> Memory {
        let what = format!("{bytes} bytes of memory");
        let address = self.0.attempt(&what, |inner| {
            // SAFETY: any size may be asked for, but for none.
            unsafe { result::malloc_async(inner.stream, bytes.max(1)) }
        });
        Memory { address: address.unwrap_or(0), bytes, device: self.clone() }
    }

    fn address(memory: &Memory) -> u64 {
        memory.address
    }

    fn write(&self, to: &mut Memory, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= to.bytes, "{offset} + {} of {}", bytes.len(), to.bytes);
        if bytes.is_empty() {
            return;
        }
        self.0.attempt("copying to the device", |inner| {
            // SAFETY: the range lies inside. The bytes lie in ordinary memory, which the driver has read
            // when it returns.
            unsafe { result::memcpy_htod_async(to.address + offset as u64, bytes, inner.stream) }
        });
    }

    fn read(&self, from: &Memory, offset: usize, out: &mut [u8]) {
        assert!(offset + out.len() <= from.bytes, "{offset} + {} of {}", out.len(), from.bytes);
        if out.is_empty() {
            return;
        }
        self.0.attempt("copying from the device", |inner| {
            // SAFETY: the range lies inside, and we wait until it has been written.
            unsafe {
                result::memcpy_dtoh_async(out, from.address + offset as u64, inner.stream)?;
                result::stream::synchronize(inner.stream)
            }
        });
    }

    unsafe fn launch(&self, kernel: &str, launch: &Launch, args: &[Arg]) {
        let mut places: Vec<*mut c_void> = args.iter().map(Arg::as_ptr).collect();
        self.0.attempt(kernel, |inner| {
            let found = inner.kernel(kernel, launch.shared_bytes)?;
            let [x, y, z] = launch.grid;
            // SAFETY: the caller's; the driver has read the arguments when it returns.
            unsafe {
                result::launch_kernel(
                    found.function,
                    (x, y, z),
                    (found.threads, 1, 1),
                    launch.shared_bytes,
                    inner.stream,
                    &mut places,
                )
            }
        });
    }

    unsafe fn product(&self, product: &Product) {
        self.0.attempt("a product", |inner| {
            let mut products = lock(&inner.products);
            let products = products.as_mut().expect("they are there as long as the device");
            // SAFETY: the caller's.
            if let Err(what) = unsafe { products.run(product) } {
                inner.fail(what);
            }
            Ok(())
        });
    }

    fn take_fault(&self) -> Option<String> {
        lock(&self.0.fault).take()
    }
}
