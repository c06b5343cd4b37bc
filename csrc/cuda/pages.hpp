#pragma once

#include "ops/pages.hpp"

namespace foretoken::cuda {

void edit_pages(const EditPagesArgs& args, Stream stream);
void keep_rows(const KeepRowsArgs& args, Stream stream);
void keep_apart(const KeepApartArgs& args, Stream stream);
void gather_apart(const GatherApartArgs& args, Stream stream);
void copy_pages(const CopyPagesArgs& args, Stream stream);

}  // namespace foretoken::cuda
