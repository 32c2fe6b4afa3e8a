// What LAMMPS' command `plugin load` is given: it loads pair_gossamer.cpp, which holds the style, so that PyTorch finds its own functions first.
// The libraries of LAMMPS export some of the same names: the wheel a plain dgemm_, which PyTorch would take for MKL's, and need 1.5 times as long for
// a step in float64.
#include <dlfcn.h>

#include <filesystem>

#include "error.h"
#include "lammps.h"

#ifndef RTLD_DEEPBIND  // macOS, where libraries always find their own first
#define RTLD_DEEPBIND 0
#endif

extern "C" void lammpsplugin_init(void *lammps, void *handle, void *registration) {
  Dl_info own;
  dladdr((void *)lammpsplugin_init, &own);
  const auto style = std::filesystem::path(own.dli_fname).replace_filename(STYLE);
  void *library = dlopen(style.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_DEEPBIND);
  if (!library) ((LAMMPS_NS::LAMMPS *)lammps)->error->all(FLERR, "the gossamer plugin cannot be loaded: {}", dlerror());
  ((decltype(&lammpsplugin_init))dlsym(library, "lammpsplugin_init"))(lammps, handle, registration);
}
