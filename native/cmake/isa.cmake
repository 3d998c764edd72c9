# The one table of instruction-set levels: name, compile flags, and the CPU features that must be present (and
# enabled by the operating system) before the level may run. Ascending: a later level implies the earlier ones.
# GM_LEVELS_INC is written from it for the run-time detector, so flags and detection cannot drift apart.
# GM_SOURCES_<level>: the level's own sources, where it takes the rest of its table from a lower level.
# GM_HIDDEN_<level>: never chosen or listed, only taken when named (a test's level).

if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  set(GM_LEVELS portable avx2 avx512 avx512bf16 amx_emulated amx)
  set(GM_FLAGS_portable -mno-avx)
  set(GM_NEEDS_portable "0")
  set(GM_FLAGS_avx2 -mavx2 -mfma -mf16c -mno-avx512f)
  set(GM_NEEDS_avx2 "kAvx2 | kFma | kF16c")
  set(GM_FLAGS_avx512 -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni
      -mno-avx512bf16 -mprefer-vector-width=512)
  set(GM_NEEDS_avx512 "${GM_NEEDS_avx2} | kAvx512 | kVnni")
  set(GM_FLAGS_avx512bf16 -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni
      -mavx512bf16 -mprefer-vector-width=512)
  set(GM_NEEDS_avx512bf16 "${GM_NEEDS_avx512} | kBf16")
  set(GM_FLAGS_amx ${GM_FLAGS_avx512bf16} -mavx512vbmi -mamx-tile -mamx-int8 -mamx-bf16)
  set(GM_NEEDS_amx "${GM_NEEDS_avx512bf16} | kVbmi | kAmx")
  set(GM_SOURCES_amx kernels/linear_amx.cc kernels/linear_amx_codes.cc kernels/linear_amx_few.cc
      kernels/linear_amx_row.cc kernels/attention.cc)
  set(GM_DEFINES_amx GM_LEVEL_avx512bf16=1 GM_TILES=1)
  # The same source with the tiles in plain C++, so that it can be tested without them.
  set(GM_FLAGS_amx_emulated ${GM_FLAGS_avx512bf16} -mavx512vbmi)
  set(GM_NEEDS_amx_emulated "${GM_NEEDS_avx512bf16} | kVbmi")
  set(GM_SOURCES_amx_emulated ${GM_SOURCES_amx})
  set(GM_DEFINES_amx_emulated ${GM_DEFINES_amx} GM_EMULATED_TILES=1)
  set(GM_HIDDEN_amx_emulated "true")
else()
  set(GM_LEVELS portable)
  set(GM_FLAGS_portable "")
  set(GM_NEEDS_portable "0")
endif()

set(GM_LEVELS_INC "")
foreach(level IN LISTS GM_LEVELS)
  if(NOT GM_HIDDEN_${level})
    set(GM_HIDDEN_${level} "false")
  endif()
  string(APPEND GM_LEVELS_INC "GM_ISA_LEVEL(${level}, ${GM_NEEDS_${level}}, ${GM_HIDDEN_${level}})\n")
endforeach()
file(GENERATE OUTPUT "${CMAKE_CURRENT_BINARY_DIR}/generated/isa_levels.inc" CONTENT "${GM_LEVELS_INC}")

# Compiles the kernel sources (or the level's own) once for one level, into an object library of that level.
function(gm_kernels level)
  set(sources ${ARGN})
  if(GM_SOURCES_${level})
    set(sources ${GM_SOURCES_${level}})
  endif()
  add_library(gm_kernels_${level} OBJECT ${sources})
  target_compile_options(gm_kernels_${level} PRIVATE
    ${GM_FLAGS_${level}} -O3 -U_FORTIFY_SOURCE -ffp-contract=off -fno-lto -fno-exceptions -fno-rtti -Wall -Wextra -Werror
    -Wno-psabi -Wno-uninitialized -Wno-maybe-uninitialized)
  target_compile_definitions(gm_kernels_${level} PRIVATE GM_LEVEL=${level} GM_LEVEL_${level}=1
                             ${GM_DEFINES_${level}})
  target_include_directories(gm_kernels_${level} PRIVATE "${PROJECT_SOURCE_DIR}/native/include"
                             "${PROJECT_SOURCE_DIR}/native/kernels")
endfunction()
