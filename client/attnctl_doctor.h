/* attnctl_doctor.h: what the files of `attnctl doctor` share. */
#ifndef ATTN_CLIENT_ATTNCTL_DOCTOR_H
#define ATTN_CLIENT_ATTNCTL_DOCTOR_H

#include "client/attnctl.h"

/** Take a step over all live workers on a cache of its own, and verify what it is answered.
 * @return the first failure's status, with its sentence; ATTN_ERR_INTERNAL for a wrong answer */
attn_status_t doctor_trip(attn_client_t *client, uint32_t workers, uint32_t *reached_p);

#endif
